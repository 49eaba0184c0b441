"""Whole slides by tiles: features, super-resolution, virtual stains."""
