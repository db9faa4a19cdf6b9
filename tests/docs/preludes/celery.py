"""What an app that exists has imported."""

from celery import Celery

from openagents_worker import register
