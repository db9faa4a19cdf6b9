"""The intake. The only place that tells what a message asks for: a known run, or a request from outside.

Our own producer's message carries three ids; the request waits in the run record. A producer without our
package sends the request itself; such a message is only as safe as the broker, until its record is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.errors import RequestInvalid, text_of
from openagents_worker.jsontext import is_whole
from openagents_worker.models import RunRequest, parse_request
from openagents_worker.store.formats import WRITTEN, can_read

__all__ = ["TaskMessage", "run_to_resume", "parse_message"]

IDS = frozenset({"run_id", "agent_id", "session_id"})
EXAMPLE = 'args: [{"agent_id": "assistant", "session_id": "s1", "input_text": "Hello"}]'


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """A Celery message of one of our tasks. `ours`: it carries the time of its sending, as only ours do.

    A run from outside is cancelled unless it has been started within `expires_ms`; 0 for never. Without an id
    of its own (`has_id`) a message gets one here, under which it is refused. Of a `format` that is not read
    here, only its id counts: it is its run's in all formats.
    """

    task_id: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    queue: str
    ours: bool
    expires_ms: int = 0
    has_id: bool = True
    format: int = WRITTEN


def parse_message(message: TaskMessage, *, max_bytes: int) -> str | RunRequest:
    """The id of a run whose record is there, or a request. Raises `RequestInvalid` or `RequestTooLarge`."""
    if not message.has_id:
        raise RequestInvalid(
            "the message has no task id", hint="headers.id is a string; it becomes the run's id"
        )
    if message.ours and not can_read(message.format):
        return message.task_id
    body = _only_argument(message)
    if isinstance(body, Mapping) and message.ours and set(body) == IDS:
        return _agreed(text_of(body["run_id"]), message)
    if isinstance(body, Mapping) and "run_id" not in body:
        body = {**body, "run_id": message.task_id}
    request = parse_request(body, max_bytes=max_bytes)
    _agreed(request.run_id, message)
    return request


def run_to_resume(message: TaskMessage) -> str:
    """The run of a `tasks.resume_run`. The checkpoint is for display: the latest one is resumed."""
    if not can_read(message.format):
        return message.task_id
    run_id = message.args[0] if message.args else message.kwargs.get("run_id")
    if not isinstance(run_id, str) or not run_id or not is_whole(run_id):
        raise RequestInvalid(
            "tasks.resume_run takes a run_id and a checkpoint_id", hint='args: ["r1", "r1:step:3"]'
        )
    return run_id


def _only_argument(message: TaskMessage) -> Any:
    arguments = [*message.args, *message.kwargs.values()]
    if len(arguments) != 1 or set(message.kwargs) - {"request"}:
        raise RequestInvalid(
            f"tasks.run_agent takes one argument, the request; the message has {len(arguments)}", hint=EXAMPLE
        )
    return arguments[0]


def _agreed(run_id: str, message: TaskMessage) -> str:
    if run_id != message.task_id:
        raise RequestInvalid(
            "the request's run_id is not the Celery task id of its message",
            hint="leave run_id out, or send the message with task_id=run_id",
            run_id=run_id,
        )
    return run_id
