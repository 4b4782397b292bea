"""Methods that skip steps, side by side at equal numbers of network evaluations: `python -m benchmarks.quality`."""
