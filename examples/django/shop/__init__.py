"""The project. Importing it creates the Celery app, as described in Celery's guide for Django."""

from shop.celery import app

__all__ = ["app"]
