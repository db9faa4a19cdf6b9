"""A producer: a process that needs only the URL of Redis, and no agents, tools or workers."""

from __future__ import annotations

import sys
from pathlib import Path

from openagents_worker import RunRequest, run_agent
from openagents_worker.cli.display import Follower


def main(run_id: str, session_id: str, result_file: str) -> None:
    """Submit a run, print its events live, then print its result and write it to a file."""
    request = RunRequest(
        agent_id="librarian",
        session_id=session_id,
        run_id=run_id,
        input_text="Which documents does this project have, how long are they, and what do they guarantee?",
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
