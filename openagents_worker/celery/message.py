"""Messages: the only place that decides what a message asks for: an accepted run, or a request from outside.

A message of our producer holds three ids; the request is stored in the run record. A producer without this
package sends the request itself. Such a message is only as durable as the broker until its record is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.errors import RequestInvalid, text_of
from openagents_worker.jsontext import is_whole
from openagents_worker.models import RunRequest, parse_request
from openagents_worker.store.formats import WRITTEN, can_read

__all__ = ["TaskMessage", "parse_message", "run_to_resume"]

IDS = frozenset({"run_id", "agent_id", "session_id"})
EXAMPLE = 'args: [{"agent_id": "assistant", "session_id": "s1", "input_text": "Hello"}]'


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """A Celery message of one of our tasks. `ours`: our producer has sent it (it has a `wake_us` header).

    A run from outside is cancelled unless it has started within `expires_ms` (0: no limit). `has_id` is False
    if the message had no valid task id; then `task_id` is a new id under which the failure is stored. If
    `format` is not readable here, only `task_id` is used: it is the run id in every format.
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
    """The id of an accepted run, or a request. Raises `RequestInvalid` or `RequestTooLarge`."""
    if not message.has_id:
        raise RequestInvalid(
            "the message has no task id", hint="headers.id must be a string; it becomes the run's id"
        )
    if message.ours and not can_read(message.format):
        return message.task_id
    argument = _single_argument(message)
    if isinstance(argument, Mapping) and message.ours and set(argument) == IDS:
        return _check_run_id(text_of(argument["run_id"]), message)
    if isinstance(argument, Mapping) and "run_id" not in argument:
        argument = {**argument, "run_id": message.task_id}
    request = parse_request(argument, max_bytes=max_bytes)
    _check_run_id(request.run_id, message)
    return request


def run_to_resume(message: TaskMessage) -> str:
    """The run id of a `tasks.resume_run` message. Its checkpoint id is for display: a run always resumes
    from its latest checkpoint. Raises `RequestInvalid`."""
    if not can_read(message.format):
        return message.task_id
    run_id = message.args[0] if message.args else message.kwargs.get("run_id")
    if not isinstance(run_id, str) or not run_id or not is_whole(run_id):
        raise RequestInvalid(
            "tasks.resume_run takes a run_id and a checkpoint_id", hint='args: ["r1", "r1:step:3"]'
        )
    return run_id


def _single_argument(message: TaskMessage) -> Any:
    """The only argument of the message. Raises `RequestInvalid` for another number of arguments."""
    arguments = [*message.args, *message.kwargs.values()]
    if len(arguments) != 1 or set(message.kwargs) - {"request"}:
        raise RequestInvalid(
            f"tasks.run_agent takes one argument, the request; the message has {len(arguments)}", hint=EXAMPLE
        )
    return arguments[0]


def _check_run_id(run_id: str, message: TaskMessage) -> str:
    """Returns the run id. Raises `RequestInvalid` if it is not the message's task id."""
    if run_id != message.task_id:
        raise RequestInvalid(
            "the request's run_id is not the Celery task id of its message",
            hint="leave run_id out, or send the message with task_id=run_id",
            run_id=run_id,
        )
    return run_id
