"""Moved to `openagents_worker.celery.pool`; this path will be removed in the next release."""

from __future__ import annotations

from openagents_worker.moved import forward

__getattr__ = forward(__name__, "openagents_worker.celery.pool", {"TaskPool": "TaskPool"})
