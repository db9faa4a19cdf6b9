"""Facts: the only place that defines how decisions about a run outside of its journal are stored.

A fact is written before anybody is woken: by a producer (a decision, a signal), by another run (a result), or
by a worker that gives the run up (a count). The attempt that uses a fact stores what it used as a record of
the journal, and takes the fact with the same commit (`scripts.commit`, argument `taken`). So a fact is either
still there, or in the record that replaced it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from openagents_worker.jsontext import dumps, loads
from openagents_worker.store.formats import WRITTEN, translate_parse_errors

__all__ = [
    "FACTS",
    "Fact",
    "FactKind",
    "FactSpec",
    "Facts",
    "facts_as_text",
    "facts_in_lua",
    "with_fact_sets",
]

MAX_COUNT_DIGITS = 10  # a longer count was not written by this library and is ignored


class FactKind(StrEnum):
    """What a fact is about. The name of its field is `kind:id`, where the id is a call id if there is one."""

    TRIES = "tries"
    INTENT = "intent"
    FENCE = "fence"
    RESOLUTION = "resolution"
    ASK = "ask"
    APPROVAL = "approval"
    CHILD = "child"
    DELEGATED = "delegated"
    GIVEN_UP = "given_up"
    SIGNAL = "signal"
    STEER = "steer"
    EXTEND = "extend"
    RESPONSE = "response"
    WAIT = "wait"
    JOB = "job"
    CALLED = "called"


@dataclass(frozen=True, slots=True)
class FactSpec:
    """How facts of a kind are stored. The value is JSON."""

    content: str
    is_count: bool = False
    """The value is a whole number, which scripts increase. A value that is not a number counts as 0."""
    ends_with_life: bool = False
    """A resumed run starts without it."""


FACTS: Mapping[FactKind, FactSpec] = {
    FactKind.TRIES: FactSpec(
        "call -> how often the run was suspended to retry it", is_count=True, ends_with_life=True
    ),
    FactKind.INTENT: FactSpec("call with effects that was begun -> its record without an outcome"),
    FactKind.FENCE: FactSpec("call with effects that was begun -> the fence of its attempt, as plain text"),
    FactKind.RESOLUTION: FactSpec(
        "call with effects that was interrupted -> what to do with it, who decided that and when",
        ends_with_life=True,
    ),
    FactKind.ASK: FactSpec("call that waits for an approval -> what is shown", ends_with_life=True),
    FactKind.APPROVAL: FactSpec("call -> the decision about its approval, who made it and when"),
    FactKind.CHILD: FactSpec("call -> the result of the child run"),
    FactKind.DELEGATED: FactSpec(
        "call that has created a child run -> its id, the life of this run, what is reserved for it, and "
        "where the call was made"
    ),
    FactKind.GIVEN_UP: FactSpec(
        "child run that is not waited for any more, and whose usage is not recorded yet -> its call, and "
        "what is reserved for it"
    ),
    FactKind.SIGNAL: FactSpec("name:number -> a value that was sent to the run, in this order"),
    FactKind.STEER: FactSpec("number -> a message for the next turn of the run, in this order"),
    FactKind.RESPONSE: FactSpec("model call -> its response that goes on in the background at the provider"),
    FactKind.WAIT: FactSpec("call that waits -> what it waits for, until when (ms), and where it was made"),
    FactKind.JOB: FactSpec(
        "call of a tool -> its job that goes on in the background of a service, and when it was started"
    ),
    FactKind.CALLED: FactSpec(
        "call in which the run was suspended -> the life in which watchers have seen it begin, or 0 after a "
        "failed try",
        ends_with_life=True,
    ),
    FactKind.EXTEND: FactSpec("number -> an extension of the budget, in this order"),
}


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact, as it is stored.

    >>> Fact.of(FactKind.SIGNAL, "payment:1", {"paid": True})
    Fact(kind=<FactKind.SIGNAL: 'signal'>, id='payment:1', text='{"paid":true}')
    """

    kind: FactKind
    id: str
    text: str
    """The value as JSON."""

    @classmethod
    def of(cls, kind: FactKind, id_: str, value: Any) -> Fact:
        return cls(kind, id_, dumps(value))

    @property
    def name(self) -> str:
        """The name of its field in the key `facts`."""
        return f"{self.kind}:{self.id}"

    def value(self, *, run_id: str | None = None) -> Any:
        """The value. Raises `RecordUnreadable` if it is not JSON."""
        with translate_parse_errors(WRITTEN, run_id=run_id):
            return loads(self.text)


class Facts:
    """The facts of a run, as of its claim.

    A kind that only a newer version knows is left out: a run that needs it has a newer format.
    """

    def __init__(self, fields: Mapping[str, str] | None) -> None:
        self._facts = {
            name: fact for name, text in (fields or {}).items() if (fact := _parse_fact(name, text))
        }

    def __len__(self) -> int:
        return len(self._facts)

    def names(self) -> frozenset[str]:
        """The names of all of them."""
        return frozenset(self._facts)

    def changed(self, names: Collection[str], read: Mapping[str, str]) -> Facts:
        """The facts after others were stored and deleted: those with these names. `read` are new values."""
        facts = Facts(read)
        facts._facts = {name: fact for name, fact in self._facts.items() if name in names} | facts._facts
        return facts

    def get(self, kind: FactKind, id_: str) -> Fact | None:
        """The fact with this id, None if nothing was decided or if it was taken."""
        return self._facts.get(f"{kind}:{id_}")

    def of(self, kind: FactKind, prefix: str = "") -> Sequence[Fact]:
        """The facts of a kind whose id begins with `prefix`. Numbers at the end of ids are in order."""
        if not self._facts:  # most runs have none
            return ()
        found = (fact for fact in self._facts.values() if fact.kind is kind and fact.id.startswith(prefix))
        return sorted(found, key=lambda fact: _order(fact.id))

    def first_of(self, name: str, taken: Collection[str] = ()) -> Fact | None:
        """The fact with this name, or the first numbered one if the name ends with a colon.

        None if there is none, or if it is in `taken`.
        """
        if not name.endswith(":"):
            return None if name in taken else self._facts.get(name)
        kind, _, prefix = name.partition(":")
        for fact in self.of(FactKind(kind), prefix):
            if fact.name[len(name) :].isdecimal() and fact.name not in taken:
                return fact
        return None

    def counts(self, kind: FactKind) -> dict[str, int]:
        """id -> number, for a kind whose values are counts."""
        assert FACTS[kind].is_count, kind
        return {
            fact.id: int(fact.text)
            for fact in self.of(kind)
            if fact.text.isdecimal() and len(fact.text) < MAX_COUNT_DIGITS
        }


_KINDS = frozenset(map(str, FactKind))


def _parse_fact(name: str, text: str) -> Fact | None:
    kind, found, id_ = name.partition(":")
    return Fact(FactKind(kind), id_, text) if found and kind in _KINDS else None


def _order(id_: str) -> tuple[str, int]:
    """Sorts `name:2` before `name:10`."""
    name, _, number = id_.rpartition(":")
    is_number = number.isascii() and number.isdecimal() and len(number) < MAX_COUNT_DIGITS
    return (name, int(number)) if is_number else (id_, 0)


def facts_in_lua(script: str) -> str:
    """Replace `FACT.tries` by the prefix of its names, and define the set `ENDS_WITH_LIFE` if it is used.

    Raises `ValueError` for a kind that does not exist.

    >>> facts_in_lua("return FACT.tries .. call")
    "return 'tries:' .. call"
    """
    return with_fact_sets(facts_as_text(script))


def with_fact_sets(script: str) -> str:
    """The script after the definition of the set `ENDS_WITH_LIFE`, if it uses it."""
    if "ENDS_WITH_LIFE" not in script:
        return script
    ending = ", ".join(f"{kind.value} = true" for kind, spec in FACTS.items() if spec.ends_with_life)
    return f"local ENDS_WITH_LIFE = {{{ending}}}\n{script}"


def facts_as_text(lua: str) -> str:
    """Replace `FACT.tries` by `'tries:'`. Raises `ValueError` for a kind that does not exist."""
    return re.sub(r"\bFACT\.(\w+)", lambda found: f"'{FactKind(found[1]).value}:'", lua)
