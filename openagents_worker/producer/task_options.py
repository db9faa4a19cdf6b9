"""Task options. The only place that selects the Celery options that a run stores for its messages.

They are stored as JSON in the field `canvas` of the record, because every message of the run needs them: at
the end of the run, Celery's tracer calls the linked tasks with the options of the current message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from celery.canvas import Signature
from kombu.utils.json import dumps, loads

from openagents_worker.arguments import number_of, reject_unstorable, text_of_caller
from openagents_worker.errors import RequestInvalid, RequestTooLarge, text_of
from openagents_worker.producer.queue_checks import check_linked_queues
from openagents_worker.suggest import did_you_mean

__all__ = [
    "STORED_OPTIONS",
    "parse_task_options",
    "stamps_of",
    "task_options_json",
    "task_options_of_message",
]

STORED_OPTIONS = (
    "chain",
    "chord",
    "group_id",
    "group_index",
    "headers",
    "link",
    "link_error",
    "parent_id",
    "priority",
    "replaced_task_nesting",
    "reply_to",
    "root_id",
)

SIGNATURES = frozenset({"chain", "chord", "link", "link_error"})
TEXTS = frozenset({"group_id", "parent_id", "reply_to", "root_id"})
NUMBERS = frozenset({"group_index", "replaced_task_nesting"})

# The names of these options in the request of a task (`self.request`). None: not read from there.
_NAMES_IN_TASK_REQUEST = {"link": "callbacks", "link_error": "errbacks", "group_id": "group", "headers": None}

# Headers that Celery or this library sets.
RESERVED_HEADERS = frozenset(
    [
        "argsrepr",
        "eta",
        "expires",
        "group",
        "group_index",
        "id",
        "ignore_result",
        "kwargsrepr",
        "lang",
        "origin",
        "parent_id",
        "replaced_task_nesting",
        "retries",
        "root_id",
        "run_format",
        "shadow",
        "stamped_headers",
        "stamps",
        "task",
        "timelimit",
        "wake_us",
    ]
)


def stamps_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The stamps in the options of a submission (`signature.stamp(...)`): their names and their values.

    Raises `RequestInvalid` for a stamp without a value, and for the name of another option.
    """
    try:
        names = sorted(set(options.get("stamped_headers") or ()))
    except TypeError:
        raise RequestInvalid(
            "stamped_headers must be a list of names", hint="use signature.stamp(name=value)"
        ) from None
    if not names:
        return {}
    if missing := [name for name in names if name not in options]:
        raise RequestInvalid(
            f"stamped_headers contains {', '.join(missing)}, but there is no option with this name",
            hint="use signature.stamp(name=value), which sets both",
        )
    if taken := [name for name in names if name in RESERVED_STAMPS]:
        raise RequestInvalid(
            f"a stamp must not be named {', '.join(taken)}, which is the name of another option",
            hint="choose another name for the stamp",
        )
    return {"stamped_headers": names, **{name: options[name] for name in names}}


def task_options_json(options: Mapping[str, Any], *, max_bytes: int, key_prefix: str = "") -> str:
    """The options of a submission that every message of its run needs, as JSON; '' without options.

    Raises `RequestInvalid` for options that are not valid, and for a linked task with an invalid queue name
    (`key_prefix` is the prefix of this library). Raises `RequestTooLarge` for more than `max_bytes`.
    """
    stamps = stamps_of(options)
    _check_names(options.keys() - stamps.keys())
    priority, headers = options.get("priority"), options.get("headers")
    if priority is not None:
        number_of("priority", priority, most=9)
    if headers is not None and not isinstance(headers, Mapping):
        raise RequestInvalid(f"headers must be a mapping of names to values, not {type(headers).__name__}")
    if taken := sorted(RESERVED_HEADERS.intersection(headers or ())):
        raise RequestInvalid(
            f"the headers {', '.join(taken)} are reserved for Celery and this library",
            hint="choose other names for your headers",
        )
    stored = {name: options[name] for name in STORED_OPTIONS if options.get(name) not in (None, [], {}, ())}
    stored |= stamps
    if not stored:
        return ""
    reject_unstorable(stored)
    check_linked_queues(stored, key_prefix)
    try:
        canvas: str = dumps(stored, allow_nan=False)  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestInvalid(
            f"{', '.join(stored)}: the values must be plain JSON: {text_of(error)}"
        ) from None
    if len(canvas.encode()) > max_bytes:
        raise RequestTooLarge(
            f"the task options have {len(canvas.encode()):,} bytes, but at most {max_bytes:,} are allowed",
            hint="pass references (a run_id, a key) to linked tasks instead of the content",
        )
    _check_shapes(parse_task_options(canvas))
    return canvas


def _check_names(names: Iterable[str]) -> None:
    """Raises `RequestInvalid` for an option that a run cannot store, and that would have no effect."""
    for name in names:
        if name in STORED_OPTIONS or name == "stamped_headers":
            continue
        known = did_you_mean(str(name), STORED_OPTIONS, "the options are")
        is_argument = name in ("countdown", "eta", "expires", "queue")
        raise RequestInvalid(
            f"canvas has no option {str(name)!r}",
            hint="queue, delay_ms and expires_ms are arguments of submit" if is_argument else known,
        )


def _check_shapes(stored: Mapping[str, Any]) -> None:
    """Raises `RequestInvalid` for options that Celery could not use at the end of the run."""
    for name in SIGNATURES & stored.keys():
        value = stored[name]
        for signature in value if isinstance(value, list) and name != "chord" else [value]:
            if not _is_signature(signature):
                raise RequestInvalid(
                    f"{name} must be a signature of a task, or a list of signatures; "
                    f"found {type(signature).__name__}",
                    hint=f"use {name}=other_task.s(…)",
                )
    for name in TEXTS & stored.keys():
        text_of_caller(name, stored[name])
    for name in NUMBERS & stored.keys():
        number_of(name, stored[name])


PARTS_OF_A_SIGNATURE: tuple[tuple[str, type], ...] = (("args", list), ("kwargs", dict), ("options", dict))


def _is_signature(value: Any) -> bool:
    """Whether Celery can make a signature of the value. Each kind of signature has another structure."""
    if not isinstance(value, dict) or not isinstance(value.get("task"), str):
        return False
    if any(not isinstance(value.get(name) or kind(), kind) for name, kind in PARTS_OF_A_SIGNATURE):
        return False  # Celery would notice it only at the end of the run
    try:
        Signature.from_dict(value)
    except Exception:  # noqa: BLE001 - the exception for a wrong structure depends on the kind
        return False
    return True


RESERVED_STAMPS = frozenset(
    [
        *STORED_OPTIONS,
        *RESERVED_HEADERS,
        *("args", "connection", "countdown", "kwargs", "name", "producer", "queue", "request", "retry"),
        *("retry_policy", "router", "routing_key", "exchange", "serializer", "compression", "task_id"),
        *("task_type", "add_to_parent", "ignore_result", "result_cls", "route_name", "time_limit"),
        *("soft_time_limit", "chain", "delivery_mode", "declare", "mandatory", "immediate", "expiration"),
    ]
)
"""Names that a stamp must not have: stamps are passed to Celery and the broker together with these
options."""


def task_options_of_message(request: Any, *, max_bytes: int, key_prefix: str = "") -> str:
    """The task options of a message that another producer has sent, from the `self.request` of its task."""
    names = {name: _NAMES_IN_TASK_REQUEST.get(name, name) for name in STORED_OPTIONS}
    options = {name: getattr(request, found, None) for name, found in names.items() if found}
    options["priority"] = (request.delivery_info or {}).get("priority") or None
    options["replaced_task_nesting"] = request.replaced_task_nesting or None
    if stamps := getattr(request, "stamps", None):
        options |= {**stamps, "stamped_headers": list(stamps)}
    return task_options_json(options, max_bytes=max_bytes, key_prefix=key_prefix)


def parse_task_options(canvas: str) -> dict[str, Any]:
    """The stored task options as keyword arguments of `Celery.send_task`.

    Invalid JSON gives no options. The run must be woken anyway: it fails when a worker claims it.
    """
    try:
        options: dict[str, Any] = loads(canvas) if canvas else {}  # type: ignore[no-untyped-call]
        known = {*STORED_OPTIONS, "stamped_headers", *options.get("stamped_headers", ())}
        return {name: value for name, value in options.items() if name in known}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}
