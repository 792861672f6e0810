"""Text: reading, tokenizers, token files."""
