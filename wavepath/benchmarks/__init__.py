"""Throughput, side by side in one run."""
