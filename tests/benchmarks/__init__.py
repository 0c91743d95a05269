"""Benchmarks: ours beside mergekit's built-ins, alternating in one run on one machine."""
