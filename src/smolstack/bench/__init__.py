"""Benchmarks: smolstack and its peers in turn, in one run, as ratios of medians."""
