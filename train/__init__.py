"""Training: data, losses, optimizers, steps, runs, plots; imports core only."""
