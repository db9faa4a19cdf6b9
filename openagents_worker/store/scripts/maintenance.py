"""Scripts for broken keys, expired entries and missing rights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from openagents_worker.store.scripts.calls import script_function

__all__ = [
    "UNKNOWN_CODE",
    "Pruned",
    "RunsInStates",
    "aside_news",
    "in_states",
    "lacking",
    "mend_key",
    "prune",
    "put_aside",
]


@script_function
def put_aside(*, key: str, code: str, what: str, item: str) -> None:
    """Add an unusable item to the list of dead letters. `key` is the key or queue where it was found."""


@script_function
def aside_news(*, limit: int) -> tuple[str, ...]:
    """The entries (JSON) that were put aside since the previous call, newest first (`store.dead_letters`)."""


@script_function
def mend_key(*, key: str, kind: str) -> Literal["MOVED", "LEFT", "SOUND"]:
    """Put a key aside if its type is not `kind`. LEFT: it has a wrong type, but it must stay in place."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """The answer of `prune`. `looked`: an index was due. Pass `name` and `kept` to the next call."""

    looked: bool
    name: str
    kept: int
    removed: int


@script_function
def prune(*, limit: int, name: str = "", kept: int = 0) -> Pruned:
    """Remove expired entries from the index `name` ('': from one that is due), examining about `limit`."""


UNKNOWN_CODE = "?"


@dataclass(frozen=True, slots=True)
class RunsInStates:
    """The answer of `in_states`: ids of runs, and of each the code of its error if codes were asked for.

    The code is UNKNOWN_CODE if only the result of the run contains it.
    """

    ids: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()


@script_function
def in_states(*, ids: Sequence[str], states: Sequence[str], with_codes: bool = False) -> RunsInStates:
    """The runs among `ids` that are in one of the states, in one command. Changes nothing."""


@script_function
def lacking(*, commands: Sequence[str], keys: Sequence[str], by_trying: bool = False) -> tuple[int, ...]:
    """The positions (from 0) of the commands that the user may not run on the key at the same position.

    Changes nothing. `by_trying`: use the method for Redis 6, which has no function for this check.
    """
