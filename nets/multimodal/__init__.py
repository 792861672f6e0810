"""Nets that relate pictures and words."""
