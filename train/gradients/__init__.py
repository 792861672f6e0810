"""Training with per-example gradients: watched, private; and passes over whole data sets."""
