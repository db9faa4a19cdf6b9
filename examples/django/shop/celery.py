"""The Celery app of the project, with agent runs."""

import os

from celery import Celery

from openagents_worker import register

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()

run_agent = register(app)  # workers that consume the queue `agents` execute runs; other tasks are unchanged
