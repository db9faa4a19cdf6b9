"""The command that lets failed runs go on: one, some, or all that pass a filter."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import click

from openagents_worker.cli.commands.options import as_json_option, filter_options, filters_of, operator
from openagents_worker.cli.exits import Exit
from openagents_worker.cli.lists import run_table
from openagents_worker.cli.terminal import dump, err, joined, out, piece, styled
from openagents_worker.errors import OpenAgentsError, RedisUnreachable
from openagents_worker.models import RunRecord, RunState
from openagents_worker.producer.client import Client
from openagents_worker.store.listing import RunFilters

__all__ = ["COMMANDS"]

SAMPLE = 5
PAGE = 200  # records of runs hold requests and results


@click.command()
@click.argument("run_ids", metavar="[RUN]...", nargs=-1)
@filter_options
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--by", default=None, help="Name for the event. Default: the user of the operating system.")
@as_json_option
def resume(run_ids: tuple[str, ...], yes: bool, by: str | None, as_json: bool, **chosen: Any) -> Exit:
    """Resume failed or cancelled runs.

    Each run continues from its last step, in a new life. Finished steps are not executed again. Name the
    runs by their ids or by options. With options, the command prints their number and asks for confirmation.

    \b
    openagents-worker resume 2f9c1e
    openagents-worker resume --state failed --since 1h --code 'llm.*'
    openagents-worker resume --state cancelled --agent assistant --yes
    """
    is_chosen = any(chosen.values())
    if bool(run_ids) == is_chosen:
        raise click.UsageError("give the ids of runs, or options that choose them (--state failed); not both")
    with Client() as client:
        if is_chosen:
            run_ids, sample = _chosen(client, filters_of(chosen))
            if not run_ids:
                return _end([], [], as_json=as_json)
            if not yes and not _is_wanted(len(run_ids), sample, client):
                err("nothing was resumed")
                return Exit.USAGE
        resumed, failed = _resume(client, run_ids, by or operator(), as_json=as_json)
    return _end(resumed, failed, as_json=as_json)


def _chosen(client: Client, filters: RunFilters) -> tuple[tuple[str, ...], list[RunRecord]]:
    """The ids of all runs that pass and can be resumed, newest first; and some of them, to be shown."""
    filters["state"] = filters.get("state") or RunState.FAILED
    run_ids: list[str] = []
    sample: list[RunRecord] = []
    cursor: str | None = None
    while True:
        page = client.runs(limit=PAGE, cursor=cursor, **filters)
        found = [record for record in page if record.state in (RunState.FAILED, RunState.CANCELLED)]
        run_ids += [record.run_id for record in found]
        sample += found[: SAMPLE - len(sample)]
        for one in page.problems:
            err(f"left out: {one.key}: {one.code}")
        if (cursor := page.next_cursor) is None:
            return tuple(run_ids), sample


def _is_wanted(number: int, sample: list[RunRecord], client: Client) -> bool:
    """Show what would be resumed and ask. Without a terminal nobody can answer: a usage error."""
    seconds, micros = client.store.ask(lambda r: r.time())
    for line in run_table(sample, seconds * 1000 + micros // 1000):
        err(line)
    if number > len(sample):
        err(styled(f"and {number - len(sample):,} more", dim=True))
    count = _runs(number)
    if not is_terminal():
        raise click.UsageError(f"{count} would be resumed, and nobody can be asked here: give --yes")
    piece(f"Resume {count}? [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _resume(
    client: Client, run_ids: Iterable[str], by: str | None, *, as_json: bool
) -> tuple[list[str], list[dict[str, Any]]]:
    """Resume each; one that cannot be resumed stops none of the others."""
    resumed: list[str] = []
    failed: list[dict[str, Any]] = []
    for run_id in dict.fromkeys(run_ids):
        try:
            state = client.record(run_id).state
            client.resume(run_id, by=by)
        except RedisUnreachable:
            raise
        except OpenAgentsError as error:
            failed.append({"run_id": run_id, "error": error.to_dict()})
            if not as_json:
                err(joined(styled(f"{run_id}: {error.code}: ", fg="red"), str(error)))
        else:
            resumed.append(run_id)
            if not as_json:
                out(f"{run_id}: {'resumed' if state.is_terminal else f'goes on already ({state})'}")
    return resumed, failed


def _end(resumed: list[str], failed: list[dict[str, Any]], *, as_json: bool) -> Exit:
    if as_json:
        dump({"resumed": resumed, "failed": failed})
    elif len(resumed) + len(failed) != 1:
        err(f"{_runs(len(resumed))} resumed" + (f", {len(failed)} could not be" if failed else ""))
    return Exit.INVALID if failed else Exit.SUCCESS


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count:,} runs"


COMMANDS = (resume,)
