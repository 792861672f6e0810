"""Metrics: numbers that judge a trained net."""
