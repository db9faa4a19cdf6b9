"""Flower: how it shows runs and what its users may do. The only place that knows Flower."""
