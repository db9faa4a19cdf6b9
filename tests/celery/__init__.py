"""Celery's habits: what a product that knows Celery does with a run, and what it then sees."""
