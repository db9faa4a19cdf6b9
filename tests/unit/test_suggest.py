"""Suggestions for misspelt names, and the cost of finding them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import pytest

from openagents_worker.errors import RequestInvalid
from openagents_worker.events import check_event
from openagents_worker.models import parse_request
from openagents_worker.settings import unknown_variables
from openagents_worker.suggest import (
    MAX_COMPARED_NAMES,
    MAX_KNOWN_NAMES,
    MAX_LISTED_CHARS,
    MAX_NAME_CHARS,
    did_you_mean,
    nearest,
)

AGENTS = [f"{kind}-{number:04}" for kind in ("clerk", "writer", "judge", "planner") for number in range(250)]


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("assistent", ["assistant", "clerk"], "assistant"),
        ("agent_di", ["agent_id", "session_id"], "agent_id"),
        ("zzz", ["assistant"], None),
        ("", ["assistant"], None),
        ("clrek-0017", AGENTS, "clerk-0017"),
        ("wrter-0010", AGENTS, "writer-0010"),
        ("xjudge-0123", AGENTS, "judge-0123"),
        ("a" * 65, ["a" * 65], None),
        ("a" * 60, ["a" * 200], None),
    ],
)
def test_the_known_name_that_was_probably_meant(name: str, known: list[str], near: str | None) -> None:
    """A name that is too long for a typing mistake has none."""
    assert nearest(name, known) == near


def test_none_is_near_names_the_known_ones_as_far_as_there_is_room() -> None:
    """A list of all agents is not a suggestion."""
    suggestion = did_you_mean("zzz", AGENTS)

    assert suggestion.startswith("known: clerk-0000, clerk-0001")
    assert len(suggestion) < MAX_LISTED_CHARS + 20


def compared(patch: pytest.MonkeyPatch, work: Callable[[], object]) -> list[tuple[int, int]]:
    """The length of each name that is compared, and with how many others."""
    found: list[tuple[int, int]] = []
    original = difflib.get_close_matches

    def watched(name: str, known: Any, *args: Any, **options: Any) -> list[str]:
        names = list(known)
        assert all(len(each) <= 2 * MAX_NAME_CHARS for each in names)
        found.append((len(name), len(names)))
        return original(name, names, *args, **options)

    with patch.context() as context:
        context.setattr(difflib, "get_close_matches", watched)
        work()
    return found


HOSTILE = ["x" * MAX_NAME_CHARS, "x" * 100_000, "clerk-" * 20_000, "ä" * 1_000_000]


@pytest.mark.parametrize("name", HOSTILE, ids=len)
@pytest.mark.parametrize("known", [AGENTS * 10, ["y" * 100_000] * 50, ["x" * 120] * 5_000], ids=len)
def test_what_is_compared_is_bounded(monkeypatch: pytest.MonkeyPatch, name: str, known: list[str]) -> None:
    """Whatever the name is, and however many names there are."""
    for length, count in compared(monkeypatch, lambda: nearest(name, known)):
        assert length <= MAX_NAME_CHARS
        assert count <= MAX_COMPARED_NAMES


def test_of_very_many_known_names_only_so_many_are_looked_at() -> None:
    """The rest is not read."""
    asked = iter(range(10 * MAX_KNOWN_NAMES))
    nearest("clerk", (f"name-{number}" for number in asked))

    assert next(asked) == MAX_KNOWN_NAMES


@pytest.mark.parametrize("name", HOSTILE[1:], ids=len)
@pytest.mark.parametrize(
    "door",
    [
        lambda name: did_you_mean(name, AGENTS),
        lambda name: check_event(f"run.{name}", {}),
        lambda name: unknown_variables({f"OPENAGENTS_{name}": "1"}),
        lambda name: refused({"agent_id": "a", "session_id": "s", "input_text": "hi", name: 1}),
    ],
    ids=["a part of the agents file", "an event", "a setting", "a field of a request"],
)
def test_each_door_compares_bounded_names(
    monkeypatch: pytest.MonkeyPatch, door: Callable[[str], object], name: str
) -> None:
    """None of them has another implementation."""
    assert all(length <= MAX_NAME_CHARS for length, _ in compared(monkeypatch, lambda: door(name)))


def test_nothing_else_compares_names() -> None:
    """Else the bound would hold here only."""
    from pathlib import Path

    import openagents_worker

    root = Path(openagents_worker.__file__).parent
    using = [
        path.relative_to(root).as_posix() for path in root.rglob("*.py") if "difflib" in path.read_text()
    ]

    assert using == ["suggest.py"]


def refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid):
        parse_request(fields)
