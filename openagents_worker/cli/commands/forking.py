"""Commands that go back: a new run from a step of another one, and a copy of a session."""

from __future__ import annotations

import click

from openagents_worker.cli.commands.options import as_json_option
from openagents_worker.cli.completion import run_ids, session_ids
from openagents_worker.cli.terminal import dump, out
from openagents_worker.producer.client import Client

__all__ = ["COMMANDS", "SESSION_COMMANDS"]


@click.command()
@click.argument("run_id", metavar="RUN", shell_complete=run_ids)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("--input", "input_text", default=None, help="Another question. Default: that of the run.")
@click.option(
    "--session",
    "session_id",
    default=None,
    help="Session of the new run: a new id, or that of the run. Default: a new session.",
)
@click.option("--run-id", "new_run_id", default=None, help="Id of the new run.")
@as_json_option
def fork(
    run_id: str,
    checkpoint: str,
    input_text: str | None,
    session_id: str | None,
    new_run_id: str | None,
    as_json: bool,
) -> None:
    """Start a new run from a step of another run.

    CHECKPOINT is the number of the step, or a checkpoint id (RUN:step:N). The steps up to it are not
    executed again. `show RUN` lists the steps; 0 is the start. By default, the new run has a new session
    with the messages from before the run.

    \b
    openagents-worker fork 2f9c1e 3
    openagents-worker fork 2f9c1e 3 --input "Use the other address."
    """
    checkpoint_id = f"{run_id}:step:{checkpoint}" if checkpoint.isdecimal() else checkpoint
    with Client() as client:
        handle = client.handle(run_id).fork(
            checkpoint_id, input_text=input_text, session_id=session_id, run_id=new_run_id
        )
        new_session_id = client.record(handle.id).session_id
    if as_json:
        dump({"run_id": handle.id, "session_id": new_session_id, "forked_from": checkpoint_id})
    else:
        out(handle.id)


@click.command("fork-session")
@click.argument("session_id", metavar="SESSION", shell_complete=session_ids)
@click.argument("new_session_id", metavar="[NEW]", required=False)
@as_json_option
def fork_session(session_id: str, new_session_id: str | None, as_json: bool) -> None:
    """Copy a session: its transcript, artifacts and state.

    Prints the id of the new session. The runs of the session are not copied.
    """
    with Client() as client:
        new_id = client.fork_session(session_id, new_session_id)
    if as_json:
        dump({"session_id": new_id, "forked_from": session_id})
    else:
        out(new_id)


COMMANDS = (fork,)
SESSION_COMMANDS = (fork_session,)
