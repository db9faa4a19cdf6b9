"""The worker: where Celery meets the runtime."""
