"""A product that reports to Sentry: an app of ours, or one of its own that we are registered in.

Imported by a worker in an environment that has `sentry-sdk`; what would be sent is written to a file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import sentry_sdk  # type: ignore[import-not-found,unused-ignore]
from celery import Celery
from sentry_sdk.integrations.logging import LoggingIntegration  # type: ignore[import-not-found,unused-ignore]
from sentry_sdk.transport import Transport  # type: ignore[import-not-found,unused-ignore]


class ToFile(Transport):  # type: ignore[misc,unused-ignore]
    """Sends nothing; appends each event to a file, from whatever process it comes."""

    def capture_envelope(self, envelope: Any) -> None:
        for item in envelope.items:
            if item.type == "event":
                with Path(os.environ["SENTRY_EVENTS"]).open("a") as events:
                    events.write(json.dumps(item.payload.json) + "\n")


LINES = [] if os.environ.get("SENTRY_LINES", "1") == "1" else [LoggingIntegration(event_level=None)]
sentry_sdk.init(dsn="http://key@localhost/1", transport=ToFile, integrations=LINES)  # and its defaults

if os.environ.get("SENTRY_REGISTER"):
    from openagents_worker import register

    app = Celery("shop", broker=os.environ["OPENAGENTS_REDIS_URL"], set_as_current=False)
    app.conf.worker_pool = "openagents_worker.celery.pool:TaskPool"
    register(app)
else:
    from tasks import app
