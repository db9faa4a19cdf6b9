"""The project's Celery app, with agent runs in it."""

import os

from celery import Celery

from openagents_worker import register

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()

run_agent = register(app)  # a worker that consumes `agents` carries runs; nothing else changes
