"""What knows Celery in a worker: the pool, the tasks, the bootsteps, and how both meet the worker process."""
