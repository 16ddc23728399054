"""Measures the kernels on a Hopper GPU: `python -m pallas_kernels.bench`."""
