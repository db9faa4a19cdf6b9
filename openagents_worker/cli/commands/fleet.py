"""Commands about the deployment: its workers, queues, agents and problems."""

from __future__ import annotations

import itertools
import sys
import time
from contextlib import suppress

import click

from openagents_worker.cli.commands.options import as_json_option
from openagents_worker.cli.health import (
    read_known_fleet,
    status_json,
    status_lines,
    worker_json,
    worker_table,
)
from openagents_worker.cli.live_region import LiveRegion, can_draw
from openagents_worker.cli.terminal import Safe, dump, err, out, styled
from openagents_worker.cli.top import SnapshotReader
from openagents_worker.errors import OpenAgentsError
from openagents_worker.producer.client import Client

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
        fleet, unreadable, aside = read_known_fleet(client), client.problems(), client.put_aside()
    if as_json:
        dump(status_json(fleet, unreadable, aside))
        return
    for line in status_lines(fleet, unreadable, _now_ms(), aside):
        out(line)


@click.command()
@click.option(
    "--interval",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0.2, 3600),
    help="Seconds between two updates.",
)
@click.option("--count", type=click.IntRange(min=1), default=None, help="End after this many updates.")
@as_json_option
def top(interval: float, count: int | None, as_json: bool) -> None:
    """Show workers, queues, and the runs that are executed, until Ctrl-C.

    On a terminal, the display is updated in place. Without a terminal, it is printed once; with --count, it
    is printed that many times. With --json, each update is one line of JSON.
    """
    with Client() as client:
        reader = SnapshotReader(client)
        if not as_json and count is None and sys.stdout.isatty() and can_draw():
            _watch_fleet(reader, interval)
            return
        for look in itertools.count(1) if as_json and count is None else range(1, (count or 1) + 1):
            snapshot = reader.read()
            if as_json:
                dump(snapshot.to_json())
            else:
                for line in snapshot.lines():
                    out(line)
            if look != count and (as_json or count is not None):
                time.sleep(interval)


def _watch_fleet(reader: SnapshotReader, interval_s: float) -> None:
    """Draw the state of the deployment until Ctrl-C. Without Redis, the last one stays, with the error."""
    snapshot, problem = reader.read(), Safe("")
    with (
        suppress(KeyboardInterrupt),
        LiveRegion(lambda: [problem, *snapshot.lines()], whole=True) as region,
    ):
        while True:
            time.sleep(interval_s)
            try:
                snapshot, problem = reader.read(), Safe("")
            except OpenAgentsError as error:
                problem = styled(f"{error.code}: {error}; shown is the last answer", fg="red")
            region.refresh()


def _now_ms() -> int:
    return round(time.time() * 1000)


COMMANDS = (status, top, workers)
