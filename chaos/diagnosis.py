"""The diagnosis: everything that is known about the runs in which an audit has found something wrong."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import islice

from chaos.deployment import Deployment
from chaos.evidence import Audit, Evidence
from openagents_worker.errors import OpenAgentsError

__all__ = ["diagnosis"]

RUN_ID = re.compile(r"\b(?:r|warm-)\d+\b")


def diagnosis(deployment: Deployment, evidence: Evidence, found: Audit) -> str:
    """What everybody knows of these runs, and the log of the workers. Times are monotonic."""
    wall_s = time.time() - time.monotonic()
    named = {name for each in asdict(found).values() for text in each for name in RUN_ID.findall(text)}
    lines = [f"the wall clock is the monotonic clock + {wall_s:.3f} s"]
    lines.append(f"Redis may have lost data: {list(evidence.data_losses)}")
    for run in evidence.accepted:
        if run.run_id in named:
            lines.append(f"--- {run}")
            for seen in (evidence.executions, evidence.answers, evidence.resolved, evidence.steered):
                lines += [str(each) for each in seen if each.run_id == run.run_id]
            lines.append(f"values sent: {evidence.sent.get(run.run_id)}")
            with suppress(OpenAgentsError):
                lines += _stored(deployment, run.run_id, wall_s)
    return "\n".join([*lines, "", deployment.log_text()])


def _stored(deployment: Deployment, run_id: str, wall_s: float) -> Iterator[str]:
    """What Redis has of a run."""
    client, admin, keys = deployment.client, deployment.admin, deployment.client.store.keys
    record = client.record(run_id)
    yield f"state: {record.state}, waiting: {record.waiting}"
    yield f"facts: {admin.hgetall(keys('facts', run_id))}"
    yield f"messages: {admin.zrange(keys('message_ids', run_id), 0, -1, withscores=True)}"
    for event in islice(client.handle(run_id).events(), int(admin.xlen(keys("events", run_id)))):
        yield f"{event.timestamp.timestamp() - wall_s:.3f} {event.name} {event.payload}"
