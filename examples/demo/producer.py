"""A producer: another process that knows Redis and nothing of agents, tools or workers."""

from __future__ import annotations

import sys
from pathlib import Path

from openagents_worker import RunRequest, run_agent
from openagents_worker.cli.display import Follower


def main(run_id: str, session_id: str, result_file: str) -> None:
    """Submit one run, show its events as they happen, then its result, which is also written to a file."""
    request = RunRequest(
        agent_id="librarian",
        session_id=session_id,
        run_id=run_id,
        input_text="Which documents does this project have, how long are they, and what do they promise?",
    )
    handle = run_agent.delay(request)
    follower = Follower(as_json=False, pieces=True)
    for event in handle.events():
        follower.event(event)
    result = handle.wait(timeout=60)
    follower.result(result)
    Path(result_file).write_text(result.model_dump_json())


if __name__ == "__main__":
    main(*sys.argv[1:])
