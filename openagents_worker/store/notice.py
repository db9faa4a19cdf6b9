"""Notice: the only place that defines the form of a request to a worker, on its channel and in its box.

A notice is one text. The id of a run alone means: cancel this run. All versions write and read this form. Any
other request is a space followed by a JSON object with `kind` and `run`; an id contains no whitespace, so the
two forms cannot be confused, and a version that knows only the first form ignores the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openagents_worker.jsontext import dumps, loads

__all__ = ["CANCEL", "FACT", "MAX_NOTICE_CHARS", "Notice", "NoticeUnreadable", "parse_notice"]

CANCEL = "cancel"
FACT = "fact"
"""There is a new fact about a run; `number` says which."""
MAX_NOTICE_CHARS = 64 * 1024
MAX_KIND_CHARS = 64
_MARK = " "


class NoticeUnreadable(ValueError):
    """A text that is not a notice."""


@dataclass(frozen=True, slots=True)
class Notice:
    """A request to a worker about one of its runs, or about the worker itself if `run_id` is empty.

    >>> Notice("cancel", "r1").text
    'r1'
    >>> Notice("steer", "r1", {"note": "be brief"}).text
    ' {"kind":"steer","note":"be brief","run":"r1"}'
    """

    kind: str
    run_id: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The notice as it is sent; a cancel request in the form that older workers read."""
        if self.kind == CANCEL:
            return self.run_id
        return _MARK + dumps(dict(sorted({**self.fields, "kind": self.kind, "run": self.run_id}.items())))


def parse_notice(text: str) -> Notice:
    """The notice with this text. Raises `NoticeUnreadable`.

    >>> parse_notice("r1")
    Notice(kind='cancel', run_id='r1', fields={})
    """
    if len(text) > MAX_NOTICE_CHARS:
        raise NoticeUnreadable(
            f"a notice has at most {MAX_NOTICE_CHARS} characters; this one has {len(text)}"
        )
    if not text.startswith(_MARK):
        return Notice(CANCEL, text)
    try:
        fields = loads(text)
    except (ValueError, RecursionError) as error:
        raise NoticeUnreadable(f"a notice must be JSON: {error}") from error
    if not isinstance(fields, dict):
        raise NoticeUnreadable("a notice must be a JSON object")
    kind, run_id = fields.pop("kind", None), fields.pop("run", "")
    if not isinstance(kind, str) or not 0 < len(kind) <= MAX_KIND_CHARS or not isinstance(run_id, str):
        raise NoticeUnreadable("a notice must have a kind, and its run must be an id")
    return Notice(kind, run_id, fields)
