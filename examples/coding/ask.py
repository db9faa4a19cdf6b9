"""The producer: it gives the agent a task, and asks the person at the terminal before a commit.

`python -m examples.coding.ask "Let greet() take a name."`
"""

from __future__ import annotations

import sys
import uuid

from examples.coding import repository
from openagents_worker import Approval, RunHandle, RunRequest, run_agent


def main(text: str) -> None:
    """Submit the task, decide about its commits, and print what the agent says."""
    repository.create()
    request = RunRequest(agent_id="coder", session_id=f"coding-{uuid.uuid4()}", input_text=text)
    handle: RunHandle[str] = run_agent.delay(request)
    for event in handle.events():
        if event.name == "tool.called":
            _say(f"  {event.payload['tool_id']}")
        elif event.name == "run.waiting":
            for asked in handle.approvals():
                _decide(handle, asked)
    print(handle.wait(timeout=60).output)


def _decide(handle: RunHandle[str], asked: Approval) -> None:
    """Show what would be committed, and pass the answer of the person on."""
    _say(repository.git("diff", "--staged"))
    _say(f"Commit this as {asked.arguments.get('message')!r}? [y/N]")
    if input().strip().lower() == "y":
        handle.approve(asked.call_id, by="terminal")
    else:
        handle.deny(asked.call_id, by="terminal", note="the person at the terminal said no")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
