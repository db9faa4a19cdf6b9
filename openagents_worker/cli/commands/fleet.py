"""Commands about the deployment: its workers, queues, agents and problems."""

from __future__ import annotations

import time

import click

from openagents_worker.cli.commands.options import as_json_option
from openagents_worker.cli.health import status_json, status_lines, worker_json, worker_table
from openagents_worker.cli.terminal import dump, err, out
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
    """Show problems, workers, queues, agents.

    OLDEST is the longest waiting time of a run in the queue. SENT AGAIN counts lost messages that were
    replaced. The exit code is 0 even if there are problems; `--json` lists them in `problems`.
    """
    with Client() as client:
        fleet = client.store.execute(read_fleet(client.store.keys, client.settings.queue))
        unreadable, aside = client.problems(), client.put_aside()
    if as_json:
        dump(status_json(fleet, unreadable, aside))
        return
    for line in status_lines(fleet, unreadable, _now_ms(), aside):
        out(line)


def _now_ms() -> int:
    return round(time.time() * 1000)


COMMANDS = (status, workers)
