"""Queue names. The only place that defines which text is a valid name of a queue of runs.

On a Redis broker, a queue is a key. If the name were a key of this library, of kombu or of Celery's result
backend, a message would turn that key into a list, and every worker would fail at it.

| rejected text | reason |
|---|---|
| empty, or longer than 200 bytes of UTF-8 | AMQP allows 255 bytes, including suffixes |
| a character other than a letter, a digit or one of `. _ - : @ / + = ~ { }` | kombu separates priorities by \
control characters; `* ? [ ]` are patterns of Redis |
| `unacked`, `unacked_index`, `unacked_mutex`, `_kombu.…` | keys of kombu |
| `….pidbox`, `….reply.…`, `celeryev…`, `amq.…` | queues of Celery's remote control and events, and of AMQP |
| `celery-task-meta-…`, `celery-taskset-meta-…`, `chord-unlock-…` | keys of Celery's result backend |
| `….wake` | queues of wake-ups |
| the key prefix of this library, alone or followed by `:…` | keys of this library |
"""

from __future__ import annotations

__all__ = ["MAX_QUEUE_BYTES", "WAKE_SUFFIX", "problem_with_queue", "problem_with_read_queue"]

MAX_QUEUE_BYTES = 200
"""AMQP allows 255 bytes; the rest is for `.wake`, a priority and a prefix of kombu."""
WAKE_SUFFIX = ".wake"
"""Wake-ups have a separate queue, so that they do not wait behind the backlog."""

_ALLOWED_SYMBOLS = frozenset("._-:@/+=~{}")
_KOMBU_KEYS = frozenset({"unacked", "unacked_index", "unacked_mutex"})
_RESERVED_PREFIXES = ("_kombu.", "celeryev", "amq.")
_RESULT_PREFIXES = ("celery-task-meta-", "celery-taskset-meta-", "chord-unlock-")
SHOWN_CHARS = 60


def problem_with_queue(name: str, prefix: str = "") -> str | None:
    """Why the name is not valid, as a sentence; None for a valid name.

    `prefix` is the key prefix of this library, '' if it is not known.

    >>> problem_with_queue("reports")
    >>> problem_with_queue("oa:due", "oa")
    "'oa:due' is not a valid queue name: names that begin with 'oa:' are keys of this library"
    """
    reason = _reason(name, prefix)
    return None if reason is None else f"{_shown(name)} is not a valid queue name: {reason}"


def problem_with_read_queue(name: str, prefix: str = "") -> str | None:
    """The same as `problem_with_queue`, for a queue that a worker reads, which may be a queue of wake-ups."""
    return problem_with_queue(name.removesuffix(WAKE_SUFFIX), prefix)


def _reason(name: str, prefix: str) -> str | None:
    length = len(name.encode("utf-8", "surrogatepass"))
    if not 1 <= length <= MAX_QUEUE_BYTES:
        return f"it has {length} bytes, but 1 to {MAX_QUEUE_BYTES} are allowed"
    if bad := next((char for char in name if not (char.isalnum() or char in _ALLOWED_SYMBOLS)), None):
        return f"it contains {bad!r}; letters, digits and {' '.join('._-:@/+=~{}')} are allowed"
    if (
        name in _KOMBU_KEYS
        or name.startswith(_RESERVED_PREFIXES)
        or name.endswith(".pidbox")
        or ".reply." in name
    ):
        return "Celery uses this name internally"
    if name.startswith(_RESULT_PREFIXES):
        return "Celery stores results under such keys"
    if name.endswith(WAKE_SUFFIX):
        return f"names that end with {WAKE_SUFFIX!r} are queues of wake-ups"
    if prefix and (name == prefix or name.startswith(f"{prefix}:")):
        return f"names that begin with {f'{prefix}:'!r} are keys of this library"
    return None


def _shown(name: str) -> str:
    return ascii(name if len(name) <= SHOWN_CHARS else f"{name[:SHOWN_CHARS]}…")
