"""Probes on frozen features, and the report."""
