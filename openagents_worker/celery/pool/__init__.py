"""The pool that executes runs on one event loop: `worker_pool = "openagents_worker.celery.pool:TaskPool"`."""

from openagents_worker.celery.pool.task_pool import TaskPool

__all__ = ["TaskPool"]
