"""What the page on schedules says of a Redis that is away, seen from beat."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT
from tests.docs.conftest import Deployment

TICK = """
import logging
from celery.beat import Scheduler
from shop_schedule import app
logging.basicConfig(level=logging.ERROR)
scheduler = Scheduler(app=app, lazy=True)
scheduler.setup_schedule()
scheduler.apply_entry(scheduler.get_schedule()["hourly-report"])
print("beat goes on")
"""


@pytest.mark.long
def test_beat_goes_on_when_redis_is_away(deployment: Deployment) -> None:
    """One error that names the entry; the next tick comes."""
    folder = deployment.project("docs/schedules.md")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # nobody listens there, and nobody else takes the port
        url = f"redis://127.0.0.1:{nobody.getsockname()[1]}/0"
        ended = subprocess.run(
            [sys.executable, "-c", TICK],
            cwd=folder,
            env={
                **deployment.env,
                "OPENAGENTS_REDIS_URL": url,
                "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )

    assert ended.stdout.strip() == "beat goes on"
    assert "Couldn't apply scheduled task hourly-report" in ended.stderr
