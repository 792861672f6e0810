"""Training that uses the gradient of each example: watched, private, streamed from disk."""
