"""Runs: folders, logs, checkpoints, resuming, command lines."""
