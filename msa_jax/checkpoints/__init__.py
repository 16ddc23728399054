"""Reads and writes released checkpoints: one module for each family."""
