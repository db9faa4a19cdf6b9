"""What a shell offers for an argument that has begun: ids that are in Redis.

Without Redis, or if it takes longer than a second, nothing is offered.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

import click

from openagents_worker.errors import OpenAgentsError
from openagents_worker.producer.client import Client

__all__ = ["COMPLETE_VARIABLE", "agent_ids", "run_ids", "session_ids"]

COMPLETE_VARIABLE = "_OPENAGENTS_WORKER_COMPLETE"
"""The variable with which the shell asks (`click.shell_completion`)."""
MAX_IDS = 200  # the newest ones
TIMEOUT_S = 1.0
PLAIN = re.compile(r"[\w.:@/+-]+")
"""An id that a shell takes as one word, whatever its rules."""

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def _offering(read: Callable[[Client], Iterable[str]]) -> Complete:
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        found: list[str] = []
        reading = threading.Thread(target=_read, args=(read, found), daemon=True)
        reading.start()
        reading.join(TIMEOUT_S)
        return [each for each in found if each.startswith(incomplete) and PLAIN.fullmatch(each)]

    return complete


def _read(read: Callable[[Client], Iterable[str]], found: list[str]) -> None:
    with suppress(OpenAgentsError), Client() as client:
        found += read(client)


run_ids = _offering(lambda client: (run.run_id for run in client.runs(limit=MAX_IDS)))
session_ids = _offering(lambda client: (one.session_id for one in client.sessions(limit=MAX_IDS)))
agent_ids = _offering(lambda client: (agent.id for agent in client.agents()))
