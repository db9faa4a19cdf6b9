"""The Celery application of this repository: `celery -A tasks worker`, `celery -A tasks flower`."""

from openagents_worker.celery.app import make_worker_app
from openagents_worker.settings import load_settings

__all__ = ["app", "prune", "recover_runs", "resume_run", "run_agent"]

app = make_worker_app(load_settings())

run_agent = app.tasks["tasks.run_agent"]
resume_run = app.tasks["tasks.resume_run"]
prune = app.tasks["tasks.prune"]
recover_runs = app.tasks["tasks.recover_runs"]
