"""The canvas. The only place that knows which of Celery's options a run keeps for its messages.

They are stored in the run's record, so that whichever message carries the run to its end has them, and
Celery's own tracer then calls what is linked to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery.canvas import Signature
from kombu.utils.json import dumps, loads

from openagents_worker.arguments import number_of, refusing, text_of_caller
from openagents_worker.errors import RequestInvalid, RequestTooLarge, text_of
from openagents_worker.producer.queue_checks import check_linked_queues

__all__ = ["KEPT", "canvas_of", "canvas_of_message", "options_of", "stamps_of"]

KEPT = (
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

# The same options as a task finds them in its request.
_IN_A_REQUEST = {"link": "callbacks", "link_error": "errbacks", "group_id": "group", "headers": None}

# What Celery and we write into a message's headers ourselves.
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
    """The stamps among the options of a submission (`signature.stamp(...)`): the names, and each value.

    Raises `RequestInvalid` for a stamp without a value, and for one whose name means something else.
    """
    try:
        names = sorted(set(options.get("stamped_headers") or ()))
    except TypeError:
        raise RequestInvalid(
            "stamped_headers is a list of names", hint="signature.stamp(name=value)"
        ) from None
    if not names:
        return {}
    if missing := [name for name in names if name not in options]:
        raise RequestInvalid(
            f"stamped_headers names {', '.join(missing)}, and there is no such option",
            hint="signature.stamp(name=value) sets both",
        )
    if taken := [name for name in names if name in RESERVED_STAMPS]:
        raise RequestInvalid(
            f"a stamp cannot be named {', '.join(taken)}: that is an option of a submission",
            hint="choose another name for the stamp",
        )
    return {"stamped_headers": names, **{name: options[name] for name in names}}


def canvas_of(options: Mapping[str, Any], *, max_bytes: int, key_prefix: str = "") -> str:
    """The options of a submission that every message of its run repeats, as JSON; '' for none.

    Raises `RequestInvalid` for what cannot be repeated and for a linked task whose queue has a name that no
    queue may have (`key_prefix` is that of this library), `RequestTooLarge` for more than `max_bytes`.
    """
    priority, headers = options.get("priority"), options.get("headers")
    if priority is not None:
        number_of("priority", priority, most=9)
    if headers is not None and not isinstance(headers, Mapping):
        raise RequestInvalid(f"headers are names with their values, not {type(headers).__name__}")
    if taken := sorted(RESERVED_HEADERS.intersection(headers or ())):
        raise RequestInvalid(f"the headers {', '.join(taken)} of a message are Celery's or ours")
    kept = {name: options[name] for name in KEPT if options.get(name) not in (None, [], {}, ())}
    kept |= stamps_of(options)
    if not kept:
        return ""
    refusing(kept)
    check_linked_queues(kept, key_prefix)
    try:
        canvas: str = dumps(kept, allow_nan=False)  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestInvalid(f"{', '.join(kept)}: not plain JSON: {text_of(error)}") from None
    if len(canvas.encode()) > max_bytes:
        raise RequestTooLarge(
            f"what is linked to the run has {len(canvas.encode()):,} bytes, {max_bytes:,} are allowed",
            hint="hand references on in a chain (a run_id, a key) instead of the content",
        )
    _check_shapes(options_of(canvas))
    return canvas


def _check_shapes(kept: Mapping[str, Any]) -> None:
    """Raises `RequestInvalid` for what Celery could not call or send at the end of the run."""
    for name in SIGNATURES & kept.keys():
        found = kept[name]
        for one in found if isinstance(found, list) and name != "chord" else [found]:
            if not _is_signature(one):
                raise RequestInvalid(
                    f"{name} must be a signature of a task, or a list of them; found {type(one).__name__}",
                    hint=f"{name}=other_task.s(…)",
                )
    for name in TEXTS & kept.keys():
        text_of_caller(name, kept[name])
    for name in NUMBERS & kept.keys():
        number_of(name, kept[name])


PARTS_OF_A_SIGNATURE: tuple[tuple[str, type], ...] = (("args", list), ("kwargs", dict), ("options", dict))


def _is_signature(value: Any) -> bool:
    """Whether Celery makes a signature of it: each of its kinds has a shape of its own."""
    if not isinstance(value, dict) or not isinstance(value.get("task"), str):
        return False
    if any(not isinstance(value.get(name) or kind(), kind) for name, kind in PARTS_OF_A_SIGNATURE):
        return False  # Celery finds out when it sends the task: the run is over then
    try:
        Signature.from_dict(value)
    except Exception:  # noqa: BLE001 - what Celery raises for a wrong shape depends on the kind
        return False
    return True


RESERVED_STAMPS = frozenset(
    [
        *KEPT,
        *RESERVED_HEADERS,
        *("args", "connection", "countdown", "kwargs", "name", "producer", "queue", "request", "retry"),
        *("retry_policy", "router", "routing_key", "exchange", "serializer", "compression", "task_id"),
        *("task_type", "add_to_parent", "ignore_result", "result_cls", "route_name", "time_limit"),
        *("soft_time_limit", "chain", "delivery_mode", "declare", "mandatory", "immediate", "expiration"),
    ]
)
"""A stamp travels as an option of its own beside these, to Celery and to the broker."""


def canvas_of_message(request: Any, *, max_bytes: int, key_prefix: str = "") -> str:
    """The same of a message that somebody else has sent, from its task's `self.request`."""
    names = {name: _IN_A_REQUEST.get(name, name) for name in KEPT}
    options = {name: getattr(request, found, None) for name, found in names.items() if found}
    options["priority"] = (request.delivery_info or {}).get("priority") or None
    options["replaced_task_nesting"] = request.replaced_task_nesting or None
    if stamps := getattr(request, "stamps", None):
        options |= {**stamps, "stamped_headers": list(stamps)}
    return canvas_of(options, max_bytes=max_bytes, key_prefix=key_prefix)


def options_of(canvas: str) -> dict[str, Any]:
    """What a canvas holds, as the keyword arguments of `Celery.send_task`.

    Nothing for one that cannot be read: its run, which must be woken for that, ends by it when it is claimed.
    """
    try:
        options: dict[str, Any] = loads(canvas) if canvas else {}  # type: ignore[no-untyped-call]
        known = {*KEPT, "stamped_headers", *options.get("stamped_headers", ())}
        return {name: value for name, value in options.items() if name in known}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}
