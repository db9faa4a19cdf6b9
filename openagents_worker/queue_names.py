"""Queue names. The only place that says which text may be the name of a queue of runs.

On a Redis broker a queue is a key. A name that is a key of this library, of kombu or of Celery's result
backend would make a list of it, and every worker would fail at that key.

| text | why it is refused |
|---|---|
| empty, or longer than 200 bytes of UTF-8 | AMQP takes 255 bytes, with what is appended |
| a character other than a letter, a digit or one of `. _ - : @ / + = ~ { }` | kombu separates priorities by \
control characters; Redis reads `* ? [ ]` as patterns |
| `unacked`, `unacked_index`, `unacked_mutex`, `_kombu.…` | kombu's own keys |
| `….pidbox`, `….reply.…`, `celeryev…`, `amq.…` | queues of Celery's remote control, of its events, of AMQP |
| `celery-task-meta-…`, `celery-taskset-meta-…`, `chord-unlock-…` | keys of Celery's result backend |
| `….wake` | the wake-ups of the queue before it |
| the key prefix of this library, or that and `:…` | our own keys |
"""

from __future__ import annotations

__all__ = ["MAX_QUEUE_BYTES", "WAKE_SUFFIX", "problem_with_queue", "problem_with_read_queue"]

MAX_QUEUE_BYTES = 200
"""AMQP allows 255 bytes; the rest is for what is appended: `.wake`, a priority, a prefix of kombu's."""
WAKE_SUFFIX = ".wake"
"""Wake-ups have a queue of their own, so that they do not stand behind the backlog."""

_OTHERS = frozenset("._-:@/+=~{}")
_KOMBUS_KEYS = frozenset({"unacked", "unacked_index", "unacked_mutex"})
_KOMBUS = ("_kombu.", "celeryev", "amq.")
_RESULTS = ("celery-task-meta-", "celery-taskset-meta-", "chord-unlock-")
SHOWN_CHARS = 60


def problem_with_queue(name: str, prefix: str = "") -> str | None:
    """Why this cannot be the name of a queue of runs, as a sentence; None where it can.

    `prefix` is the key prefix of this library, '' where it is not known.

    >>> problem_with_queue("reports")
    >>> problem_with_queue("oa:due", "oa")
    "'oa:due' is not a valid queue name: names that begin with 'oa:' are keys of this library"
    """
    why = _why_not(name, prefix)
    return None if why is None else f"{_shown(name)} is not a valid queue name: {why}"


def problem_with_read_queue(name: str, prefix: str = "") -> str | None:
    """As `problem_with_queue`, for a queue that a worker reads: it may be that of another one's wake-ups."""
    return problem_with_queue(name.removesuffix(WAKE_SUFFIX), prefix)


def _why_not(name: str, prefix: str) -> str | None:
    length = len(name.encode("utf-8", "surrogatepass"))
    if not 1 <= length <= MAX_QUEUE_BYTES:
        return f"it has {length} bytes, and 1 to {MAX_QUEUE_BYTES} are allowed"
    if bad := next((char for char in name if not (char.isalnum() or char in _OTHERS)), None):
        return f"it has {bad!r}; letters, digits and {' '.join('._-:@/+=~{}')} are allowed"
    if name in _KOMBUS_KEYS or name.startswith(_KOMBUS) or name.endswith(".pidbox") or ".reply." in name:
        return "Celery uses it for itself"
    if name.startswith(_RESULTS):
        return "Celery stores results under such keys"
    if name.endswith(WAKE_SUFFIX):
        return f"names that end with {WAKE_SUFFIX!r} are queues of wake-ups"
    if prefix and (name == prefix or name.startswith(f"{prefix}:")):
        return f"names that begin with {f'{prefix}:'!r} are keys of this library"
    return None


def _shown(name: str) -> str:
    return ascii(name if len(name) <= SHOWN_CHARS else f"{name[:SHOWN_CHARS]}…")
