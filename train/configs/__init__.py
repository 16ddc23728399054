"""Presets: each module holds one comparison, named COMPARISON."""
