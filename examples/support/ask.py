"""The producer: a customer writes to the shop. It needs only the address of Redis.

`python -m examples.support.ask ada "A17 is broken. I want my money back."`
"""

from __future__ import annotations

import sys

from openagents_worker import RunRequest, run_agent


def main(customer: str, text: str) -> None:
    """Submit the message in the conversation of the customer, and print the answer when it comes."""
    request = RunRequest(agent_id="support", session_id=f"customer-{customer}", input_text=text)
    handle = run_agent.delay(request)
    for event in handle.events():
        if event.name == "tool.approval_needed":
            call_id = event.payload["call_id"]
            _say(f"A colleague has to decide: {event.payload['tool_id']} {event.payload['params']}")
            _say(f"  openagents-worker approve {handle.id} {call_id}")
            _say(f"  openagents-worker deny {handle.id} {call_id} --note 'Why not.'")
    print(handle.wait(timeout=60).output)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
