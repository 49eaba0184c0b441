"""Flax linen modules. They return named intermediates."""
