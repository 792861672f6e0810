"""Diffusion: the noising process and its schedules, losses, samplers and likelihoods, for any model `(x, time) -> ...`.

Images are (batch, channels, ...) in [-1, 1], batch leading; flat data (batch, width) works as well. `time` (batch,) is
int64 and counts noisings from 0: x at time t has been noised t + 1 times, so it is the papers' x_{t+1}, and the last
time is steps - 1. A model is a function closed over its parameters; its output has the shape of x or, where it also
learns the variance, twice the channels.
"""
