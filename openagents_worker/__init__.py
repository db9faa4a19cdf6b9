"""Durable LLM-agent runs on plain Celery and Redis."""
