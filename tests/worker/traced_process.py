"""A real worker process, without Celery, that writes its spans to a file as JSON.

`python -m tests.worker.traced_process SPANS` with the Redis of the environment. It executes the agent
`traced`, which calls the tool `wait_for_go` in its second step; the tool waits until `SPANS.go` exists.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from openagents_worker import tool
from openagents_worker.agents import load_agents
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.settings import load_settings
from openagents_worker.telemetry.opentelemetry import export_to_opentelemetry
from openagents_worker.testing.polling import PollingProcess
from tests.support.waiting import await_for

AGENT: dict[str, Any] = {
    "id": "traced",
    "name": "traced",
    "memory": {"type": "buffer"},
    "pattern": {"type": "react"},
    "tools": [
        {"id": "note", "impl": "tests.worker.traced_process.note"},
        {"id": "wait_for_go", "impl": "tests.worker.traced_process.wait_for_go"},
    ],
    "llm": {
        "provider": "scripted",
        "script": [
            {"tool_calls": [{"name": "note", "arguments": {}}]},
            {"tool_calls": [{"name": "wait_for_go", "arguments": {}}]},
            {"text": "the secret answer"},
        ],
    },
}


@tool
async def note() -> str:
    """Return a secret."""
    return "a secret result"


@tool
async def wait_for_go() -> str:
    """Wait until the file with the permission exists."""
    await await_for(Path(f"{sys.argv[1]}.go").exists, "it may go on")
    return "gone"


def main(spans: str) -> None:
    with Path(spans).open("a") as file:
        provider = TracerProvider()
        exporter = ConsoleSpanExporter(out=file, formatter=lambda span: f"{span.to_json(indent=None)}\n")
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        export_to_opentelemetry(provider)
        assembly = Assembly(load_agents(json.dumps({"agents": [AGENT]}), env={}), env={})
        process = PollingProcess(load_settings(), assembly, node="traced@test")
        process.start_and_wait()
        print("started", flush=True)
        sys.stdin.read()  # until the test closes it
        process.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
