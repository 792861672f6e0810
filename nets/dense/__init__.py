"""Nets with an output per pixel or region: segmentation, detection."""
