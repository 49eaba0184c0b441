"""Whole slides by tiles: features today."""
