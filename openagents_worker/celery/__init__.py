"""The Celery side of a worker: the app, the tasks, the pool, and the bootsteps of the worker process."""
