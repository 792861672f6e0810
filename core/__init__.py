"""What every network is made of: trees, keys, specs, layers, attention, taps, transforms."""
