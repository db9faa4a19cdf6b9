"""The command that resumes failed and cancelled runs, by their ids or by a filter."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import click

from openagents_worker.cli.commands.options import (
    as_json_option,
    current_user,
    filter_options,
    to_run_filters,
)
from openagents_worker.cli.completion import run_ids as offered_run_ids
from openagents_worker.cli.exits import Exit
from openagents_worker.cli.lists import run_table
from openagents_worker.cli.terminal import dump, err, joined, out, piece, styled
from openagents_worker.errors import OpenAgentsError, RedisUnreachable, RedisWrongType
from openagents_worker.models import RunRecord, RunState
from openagents_worker.producer.client import Client
from openagents_worker.producer.plans import RESUMABLE
from openagents_worker.store.listing import RunFilters

__all__ = ["COMMANDS"]

SAMPLE = 5  # runs that are shown before the question
PAGE = 200  # runs per request: a record may be large, because it contains the request and the result


@click.command()
@click.argument("run_ids", metavar="[RUN]...", nargs=-1, shell_complete=offered_run_ids)
@filter_options(RESUMABLE)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--by", default=None, help="Name for the event. Default: the user of the operating system.")
@as_json_option
def resume(run_ids: tuple[str, ...], yes: bool, by: str | None, as_json: bool, **options: Any) -> Exit:
    """Resume failed or cancelled runs.

    Each run continues from its last step, in a new life. Finished steps are not executed again. Name the
    runs by their ids or by options. With options, the command prints their number and asks for confirmation.

    \b
    openagents-worker resume 2f9c1e
    openagents-worker resume --state failed --since 1h --code 'llm.*'
    openagents-worker resume --state cancelled --agent assistant --yes
    """
    has_filter = any(options.values())
    if bool(run_ids) == has_filter:
        raise click.UsageError("give either the ids of runs or options that select runs (--state failed)")
    with Client() as client:
        if has_filter:
            run_ids, sample = _matching_runs(client, to_run_filters(options))
            if not run_ids:
                return _report_result([], [], as_json=as_json)
            if not yes and not _confirm(len(run_ids), sample, client):
                err("no run was resumed")
                return Exit.USAGE
        resumed, failed = _resume(client, run_ids, by or current_user(), as_json=as_json)
    return _report_result(resumed, failed, as_json=as_json)


def _matching_runs(client: Client, filters: RunFilters) -> tuple[tuple[str, ...], list[RunRecord]]:
    """The ids of all failed or cancelled runs that match the filters, newest first, and a few records.

    Without a filter by state, only failed runs match. Unreadable records are reported and left out.
    """
    filters["state"] = filters.get("state") or RunState.FAILED
    run_ids: list[str] = []
    sample: list[RunRecord] = []
    cursor: str | None = None
    while True:
        page = client.runs(limit=PAGE, cursor=cursor, **filters)
        run_ids += [record.run_id for record in page]
        sample += page.items[: SAMPLE - len(sample)]
        for one in page.problems:
            err(f"left out: {one.key}: {one.code}")
        if (cursor := page.next_cursor) is None:
            return tuple(run_ids), sample


def _confirm(number: int, sample: list[RunRecord], client: Client) -> bool:
    """Show the runs and ask whether to resume them. Raises `UsageError` without a terminal."""
    seconds, micros = client.store.ask(lambda r: r.time())
    for line in run_table(sample, seconds * 1000 + micros // 1000):
        err(line)
    if number > len(sample):
        err(styled(f"and {number - len(sample):,} more", dim=True))
    count = _number_of_runs(number)
    if not is_terminal():
        raise click.UsageError(f"{count} would be resumed, but there is no terminal to ask: give --yes")
    piece(f"Resume {count}? [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def is_terminal() -> bool:
    """Whether the user can be asked a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _resume(
    client: Client, run_ids: Iterable[str], by: str | None, *, as_json: bool
) -> tuple[list[str], list[dict[str, Any]]]:
    """Resume each run. Return the ids of the resumed runs, and the errors of the others."""
    resumed: list[str] = []
    failed: list[dict[str, Any]] = []
    for run_id in dict.fromkeys(run_ids):
        try:
            state = client.record(run_id).state
            client.resume(run_id, by=by)
        except OpenAgentsError as error:
            if isinstance(error, RedisUnreachable) and not isinstance(error, RedisWrongType):
                raise
            failed.append({"run_id": run_id, "error": error.to_dict()})
            if not as_json:
                err(joined(styled(f"{run_id}: {error.code}: ", fg="red"), str(error)))
        else:
            resumed.append(run_id)
            if not as_json:
                out(f"{run_id}: {'resumed' if state.is_terminal else f'is already active ({state})'}")
    return resumed, failed


def _report_result(resumed: list[str], failed: list[dict[str, Any]], *, as_json: bool) -> Exit:
    if as_json:
        dump({"resumed": resumed, "failed": failed})
    elif len(resumed) + len(failed) != 1:
        err(f"{_number_of_runs(len(resumed))} resumed" + (f", {len(failed)} not resumed" if failed else ""))
    return Exit.INVALID if failed else Exit.SUCCESS


def _number_of_runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count:,} runs"


COMMANDS = (resume,)
