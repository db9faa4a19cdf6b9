"""Commands about sessions, and about the indexes of sessions and runs."""

from __future__ import annotations

from dataclasses import asdict

import click

from openagents_worker.cli.commands.options import as_json_option, show_page
from openagents_worker.cli.completion import session_ids
from openagents_worker.cli.lists import missing_run_line, session_lines, session_table
from openagents_worker.cli.terminal import dump, out
from openagents_worker.producer.client import Client

__all__ = ["COMMANDS"]


@click.command()
@click.option("--limit", default=20, show_default=True, help="Sessions per page, at most 1000.")
@click.option("--cursor", default=None, help="The next_cursor of the previous page.")
@as_json_option
def sessions(limit: int, cursor: str | None, as_json: bool) -> None:
    """List sessions, newest run first."""
    with Client() as client:
        page = client.sessions(limit=limit, cursor=cursor)
    show_page(page, asdict, session_table, as_json=as_json)


@click.command()
@click.argument("session_id", metavar="SESSION", shell_complete=session_ids)
@as_json_option
def session(session_id: str, as_json: bool) -> None:
    """Show a session: its transcript and its active run.

    Also shows the waiting runs, the artifacts, the state and the size in bytes, and which of the newest 100
    runs have ended without an entry in the transcript.
    """
    with Client() as client:
        view = client.session(session_id)
        runs = client.runs(session_id=session_id).items
    in_transcript = {str(message.get("run_id")) for message in view.transcript}
    missing = [run for run in runs if run.state.is_terminal and run.run_id not in in_transcript]
    if as_json:
        artifacts = [one.model_dump(mode="json") for one in view.artifacts]
        ids = [run.run_id for run in missing]
        dump({**asdict(view), "artifacts": artifacts, "left_nothing": ids})
    else:
        for line in [*session_lines(view), *map(missing_run_line, missing)]:
            out(line)


@click.command()
@as_json_option
def prune(as_json: bool) -> None:
    """Remove expired entries from the indexes.

    Workers do this every minute.
    """
    with Client() as client:
        removed = client.prune()
    if as_json:
        dump({"removed": removed})
    else:
        out(f"{removed} expired entries removed")


@click.command("delete-session")
@click.argument("session_id", metavar="SESSION", shell_complete=session_ids)
@click.option("--force", is_flag=True, help="Cancel its runs that have not ended, and delete them, too.")
@as_json_option
def delete_session(session_id: str, force: bool, as_json: bool) -> None:
    """Delete a session and all data of its runs.

    Transcript, artifacts, state, and the records, journals and events of its runs are removed from Redis at
    once. A session with a run that has not ended is refused without --force. What was sent to models and
    tools is not taken back.
    """
    with Client() as client:
        runs = client.delete_session(session_id, force=force)
    if as_json:
        dump({"session_id": session_id, "runs": runs})
    else:
        out(f"{session_id}: deleted, with {runs} {'run' if runs == 1 else 'runs'}")


COMMANDS = (sessions, session, delete_session, prune)
