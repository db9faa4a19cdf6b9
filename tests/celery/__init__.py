"""Celery's features, used with runs by a product: canvas, states, revocation, Flower, eager mode."""
