"""Commands about the deployment: its workers, queues, agents and problems."""

from __future__ import annotations

import time
from functools import partial

import click

from openagents_worker.cli.commands.options import as_json_option
from openagents_worker.cli.health import (
    status_json,
    status_lines,
    without_removed_agents,
    worker_json,
    worker_table,
)
from openagents_worker.cli.terminal import dump, err, out
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from openagents_worker.store.fleet import read_fleet

__all__ = ["COMMANDS"]


@click.command()
@as_json_option
def workers(as_json: bool) -> None:
    """List the workers with their queues and agents.

    LOOP LAG is the longest time for which the event loop of the worker was blocked between its last two
    heartbeats. LEASE LEFT is the time until other workers take its runs, unless the lease is renewed.
    """
    with Client() as client:
        found = client.workers()
    if as_json:
        dump({"items": [worker_json(worker) for worker in found]})
        return
    if not found:
        err("no workers; start one: openagents-worker worker")
        return
    for line in worker_table(found, _now_ms()):
        out(line)


@click.command()
@as_json_option
def status(as_json: bool) -> None:
    """Show problems, workers, queues, agents, and limits of the fleet for which runs wait.

    PART is a background part of a worker, such as its outbox. It is listed if it is failing or late, and for
    ten minutes after an error from which it has recovered. FAILURES counts failed rounds in a row. OLDEST is
    the longest waiting time of a run in the queue. SENT AGAIN counts lost messages that were replaced. The
    exit code is 0 even if there are problems; `--json` lists them in `problems`.
    """
    with Client() as client:
        fleet = client.store.execute(read_fleet(client.store.keys, client.settings.queue))
        fleet = without_removed_agents(fleet, partial(_has_open_runs, client))
        unreadable, aside = client.problems(), client.put_aside()
    if as_json:
        dump(status_json(fleet, unreadable, aside))
        return
    for line in status_lines(fleet, unreadable, _now_ms(), aside):
        out(line)


def _has_open_runs(client: Client, agent_id: str) -> bool:
    """Whether a run of the agent has not ended. True as well if there are too many runs to find out."""
    open_states = [state for state in RunState if not state.is_terminal]
    page = client.runs(agent_id=agent_id, state=open_states, limit=1)
    return bool(page.items or page.next_cursor)


def _now_ms() -> int:
    return round(time.time() * 1000)


COMMANDS = (status, workers)
