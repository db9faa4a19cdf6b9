"""The project. Importing it makes the Celery app, as Celery's guide for Django says."""

from shop.celery import app

__all__ = ["app"]
