"""The worker process: heartbeat, watchdog, rescue loop and drain. It imports no Celery."""
