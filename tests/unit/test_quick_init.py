"""Quick constructors: they do exactly what the constructor of `dataclass` does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field, replace
from inspect import signature
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.llm.base import CallInfo, Delta, LLMResponse, LLMToolCall, LLMUsage, ModelRequest
from openagents_worker.quick_init import quick_init
from openagents_worker.runtime.call_ids import OuterCall
from openagents_worker.runtime.calls.tool_call import ToolRun
from openagents_worker.runtime.effects import InterruptedCalls
from openagents_worker.runtime.ending import Ending, StoredEnding
from openagents_worker.runtime.finishing import SessionState
from openagents_worker.runtime.history import RunHistory, RunStart
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.marks import Executing
from openagents_worker.runtime.parting import AttemptResult
from openagents_worker.runtime.prepare import Prepared
from openagents_worker.runtime.replay_loading import LoadedRecords
from openagents_worker.runtime.retry import Tries
from openagents_worker.store.scripts import Claimed, ScriptCall, WriteResult
from openagents_worker.tools.executors import CallRules


@dataclass(frozen=True, slots=True)
class _Plain:
    """One field of each sort."""

    needed: Any
    number: int = 3
    made: list[Any] = field(default_factory=list)
    own: list[Any] = field(default_factory=list, init=False, compare=False)
    fixed: str = field(default="fixed", init=False)
    named: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    late: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", abs(self.number))


@quick_init
@dataclass(frozen=True, slots=True)
class _Quick:
    needed: Any
    number: int = 3
    made: list[Any] = field(default_factory=list)
    own: list[Any] = field(default_factory=list, init=False, compare=False)
    fixed: str = field(default="fixed", init=False)
    named: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    late: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", abs(self.number))


QUICK = [
    _Quick,
    AttemptResult,
    CallInfo,
    CallRules,
    Claimed,
    Delta,
    Ending,
    Executing,
    InterruptedCalls,
    LLMResponse,
    LLMToolCall,
    LLMUsage,
    LoadedRecords,
    ModelRequest,
    OuterCall,
    Prepared,
    Record,
    RunHistory,
    RunIdentity,
    RunStart,
    ScriptCall,
    SessionState,
    StoredEnding,
    ToolRun,
    Tries,
    WriteResult,
]


def _made(cls: Any, positional: list[Any], named: dict[str, Any]) -> Any:
    try:
        made = cls(*positional, **named)
    except TypeError as error:
        return str(error).replace("_Quick", "_Plain")
    return [getattr(made, name) for name in cls.__dataclass_fields__]


@given(
    positional=st.lists(st.integers(), max_size=5),
    named=st.dictionaries(
        st.sampled_from(["needed", "number", "made", "own", "fixed", "named", "late", "unknown"]),
        st.one_of(st.integers(), st.lists(st.integers(), max_size=1)).filter(lambda value: value != []),
        max_size=4,
    ),
)
def test_every_call_has_the_same_result(positional: list[Any], named: dict[str, Any]) -> None:
    """Arguments by place and by name, defaults, and the errors for missing and unknown ones."""
    if isinstance(named.get("number"), list):
        del named["number"]
    assert _made(_Quick, positional, named) == _made(_Plain, positional, named)


def test_the_signature_is_the_same() -> None:
    """Documentation and editors show the arguments of the class."""
    assert str(signature(_Quick)) == str(signature(_Plain))
    assert _Quick.__init__.__annotations__ == _Plain.__init__.__annotations__


def test_values_that_a_field_makes_are_not_shared() -> None:
    """A default factory is called for each value."""
    first, second = _Quick(1), _Quick(1)
    assert first == second
    assert first.made is not second.made
    assert first.own is not second.own
    assert first.named is not second.named


def test_a_quick_value_is_frozen_and_can_be_copied() -> None:
    """It stays a frozen dataclass: it is compared, hashed, replaced and copied as before."""
    usage = LLMUsage(1, 2, 3, {"cached_tokens": 1})
    with pytest.raises(FrozenInstanceError):
        usage.input_tokens = 2  # type: ignore[misc]
    assert copy.deepcopy(usage) == copy.copy(usage) == usage
    assert replace(usage, input_tokens=7) == LLMUsage(7, 2, 3, {"cached_tokens": 1})
    assert hash(OuterCall("a", "tool", "n")) == hash(OuterCall("a", "tool", "n"))


@pytest.mark.parametrize("cls", QUICK)
def test_the_constructor_sets_every_field(cls: Any) -> None:
    """A slot that is not set would raise AttributeError when it is read."""
    needed = [name for name, each in signature(cls).parameters.items() if each.default is each.empty]
    made = cls(**dict.fromkeys(needed, "x"))
    for name in cls.__dataclass_fields__:
        getattr(made, name)
