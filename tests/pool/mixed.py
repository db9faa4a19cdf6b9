"""An existing app that is registered: our pool, and two of the app's own tasks at a time.

Run by a separate worker process: `celery -A tests.pool.mixed worker`.
"""

from __future__ import annotations

import json
import logging
import os
import time

import redis
from celery import Celery

from openagents_worker import register

URL = os.environ["PRODUCT_REDIS"]
NOTES = "notes"

if "PRODUCT_LOG" in os.environ:  # the product has set up a log before Celery does
    logging.basicConfig(format="product's %(levelname)s %(name)s %(message)s", level=logging.INFO)
app = Celery("mixed", broker=URL, backend=URL)
app.conf.worker_hijack_root_logger = "PRODUCT_LOG" not in os.environ
app.conf.worker_pool = "openagents_worker.celery.pool:TaskPool"
app.conf.worker_concurrency = 2
app.conf.update(json.loads(os.environ.get("PRODUCT_CONF", "{}")))
register(app)


@app.task
def blocks(tag: str, until: str) -> str:
    """Record the start, and end when a note exists under `until`."""
    with redis.Redis.from_url(URL) as client:
        client.rpush(f"{NOTES}:{tag}", "begun")
        while not client.exists(f"{NOTES}:{until}"):
            time.sleep(0.01)
    return tag
