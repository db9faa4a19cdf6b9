"""Call names: the only place that shortens call ids for display, and finds calls by a part of their id."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["find_call", "short_call_id"]

HEX_CHARS = 8  # of the digest in a call id, when it is shown


def short_call_id(call_id: str) -> str:
    """A call id with a shortened digest, for display: `{name}:{8 hex}:{n}`.

    >>> short_call_id("weather:0123456789abcdef:2")
    'weather:01234567:2'
    """
    name, found, rest = call_id.rpartition(":")
    before, _, digest = name.rpartition(":")
    if not found or not before or len(digest) <= HEX_CHARS or set(digest) - set("0123456789abcdef"):
        return call_id
    return f"{before}:{digest[:HEX_CHARS]}:{rest}"


def find_call(call_ids: Iterable[str], wanted: str) -> list[str]:
    """The ids that begin with `wanted`, in full or as displayed. An exact match is returned alone.

    >>> find_call(["calc:0123456789:1", "calc:0199999999:1"], "calc:012")
    ['calc:0123456789:1']
    """
    ids = list(dict.fromkeys(call_ids))
    exact = [id_ for id_ in ids if wanted in (id_, short_call_id(id_))]
    return exact or [id_ for id_ in ids if id_.startswith(wanted) or short_call_id(id_).startswith(wanted)]
