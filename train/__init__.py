"""What training needs: data, losses, optimizers, steps, checkpoints, logs, plots; imports core only."""
