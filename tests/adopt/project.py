"""A Django project with its own conventions. The only place that writes one, and runs programs in it.

Late acknowledgement, a result backend, routes that would catch our tasks, packages `tasks` and `config`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["run_in", "write_project"]

FILES = {
    "config/__init__.py": "from config.celery import app\n__all__ = ['app']\n",
    "config/settings.py": """
import os
from pathlib import Path

SECRET_KEY = "not a secret"
INSTALLED_APPS = ["tasks"]
USE_TZ = True
DATABASE = Path(__file__).parents[1] / "db.sqlite3"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": DATABASE}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
CELERY_BROKER_URL = os.environ["PRODUCT_REDIS"] + "/1"
CELERY_RESULT_BACKEND = os.environ["PRODUCT_REDIS"] + "/2"
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_ROUTES = {"tasks.*": {"queue": "low"}}
CELERY_TASK_DEFAULT_QUEUE = "default"
CELERY_TASK_SOFT_TIME_LIMIT = 60
CELERY_WORKER_SEND_TASK_EVENTS = False
""",
    "config/celery.py": """
import os
from celery import Celery
from openagents_worker import register

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
app = Celery("product")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
run_agent = register(app)
""",
    "tasks/__init__.py": "",
    "tasks/models.py": """
from django.db import models

class Order(models.Model):
    text = models.CharField(max_length=100)
""",
    "tasks/tasks.py": """
from celery import shared_task

@shared_task(bind=True)
def add(self, a, b):
    return {"sum": a + b, "queue": self.request.delivery_info["routing_key"], "acks_late": self.acks_late}
""",
    "tasks/tools.py": """
import threading
from django.db import connection
from openagents_worker import tool
from tasks.models import Order

@tool
def count_orders() -> dict:
    '''Counts the orders.'''
    fresh = connection.connection is None
    return {"orders": Order.objects.count(), "fresh": fresh, "thread": threading.current_thread().name}
""",
}


def write_project(folder: Path, model_url: str) -> None:
    """The project's files, its database, and the agents file of its runs."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    tools = [{"id": "count_orders", "impl": "tasks.tools.count_orders"}]
    clerk = {
        "id": "clerk",
        "name": "Clerk",
        "llm": {"provider": "openai_compatible", "model": "m", "api_base": model_url},
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
        "tools": tools,
    }
    (folder / "agents.json").write_text(json.dumps({"version": "1.0", "agents": [clerk]}))


def run_in(folder: Path, program: str, env: Mapping[str, str]) -> Any:
    """What a program prints, as JSON; it runs in the project with Django set up, and prints nothing else."""
    set_up = "import json, django, config\ndjango.setup()\nfrom config.celery import app, run_agent\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", set_up + program],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)
