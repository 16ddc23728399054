"""Measures the kernels on a Hopper GPU: `python -m benchmarks`."""
