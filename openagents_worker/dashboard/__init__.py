"""Flower. The only place that knows it."""
