"""The parts of every network: trees, keys, specs, layers, attention, taps, transforms."""
