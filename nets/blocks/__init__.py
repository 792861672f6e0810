"""Blocks that several nets are made of."""
