"""A producer: `python producer.py submit REQUESTS` or `… use REQUESTS`; requests and answers are JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openagents_worker
from openagents_worker import OpenAgentsError, RunFailed, RunHandle, RunRequest, run_agent

PATIENCE_S = 60

Requests = list[dict[str, Any]]


def submit(requests: Requests) -> dict[str, Any]:
    """Submits them all and looks no further."""
    return {"runs": [run_agent.delay(request).id for request in requests]}


def use(requests: Requests) -> dict[str, Any]:
    """Does to runs what a product does: one is watched to its end, one is cancelled at work."""
    watched, cancelled, awaited = requests
    handle = run_agent.delay(RunRequest(**watched))
    events = list(handle.events())
    doomed = run_agent.delay(cancelled)
    for event in doomed.events():
        if event.name == "tool.called":
            doomed.cancel("enough")
    try:
        doomed.get(timeout=PATIENCE_S)
        code = "none"
    except RunFailed as error:
        code = error.code
    return {
        "seqs": [event.seq for event in events if event.seq is not None],
        "final": events[-1].final,
        "output": handle.wait(timeout=PATIENCE_S).final_output,
        "steps": handle.record().steps,
        "again": run_agent.delay(RunRequest(**watched)).id == handle.id,
        "cancelled": code,
        "awaited": asyncio.run(_wait(awaited)),
    }


def look(requests: Requests) -> dict[str, Any]:
    """What a product sees of runs: the state of each, or the code of the error."""
    seen = []
    for request in requests:
        try:
            seen.append(RunHandle(request["run_id"]).record().state.value)
        except OpenAgentsError as error:
            seen.append(error.code)
    return {"seen": seen}


def fail(requests: Requests) -> dict[str, Any]:
    """What a product is told of a run that failed: raised, and as a result."""
    handle = run_agent.delay(requests[0])
    try:
        handle.get(timeout=PATIENCE_S)
        raised = None
    except RunFailed as error:
        raised = error
    details = handle.wait(timeout=PATIENCE_S).error_details
    assert raised is not None
    assert details is not None
    return {
        "code": raised.code,
        "message": details.message,
        "traceback": details.context.get("traceback"),
        "notes": getattr(raised, "__notes__", []),
    }


async def _wait(request: dict[str, Any]) -> Any:
    handle = await run_agent.adelay(request)
    return (await handle.wait(timeout=PATIENCE_S)).final_output


if __name__ == "__main__":
    told = {"submit": submit, "use": use, "look": look, "fail": fail}[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps({**told, "from": openagents_worker.__file__}))
