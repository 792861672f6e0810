"""Super-resolution: nets that enlarge pictures."""
