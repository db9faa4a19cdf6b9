"""What is wrong in an agents file is told all at once, each with its path, its line and a hint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.agents import load_agents, read_agents_file
from openagents_worker.agents.positions import NotJson, read_json
from openagents_worker.errors import ConfigLoadError, ConfigValidationError

GOOD = {
    "id": "good",
    "name": "Good",
    "llm": {"provider": "mock"},
    "pattern": {"type": "react"},
    "memory": {"type": "buffer"},
}
WRONG_EVERYWHERE = """{
  "version": "1.0",
  "agnts": 1,
  "agents": [
    {
      "id": "a",
      "nmae": "A",
      "llm": {"provider": "mock", "temperature": 3,
              "retry": {"attempts": 1, "max_attempts": 0}},
      "pattern": {"type": "react", "impl": "a.B"},
      "tools": [
        {"id": "t", "type": "calc"},
        {"id": "t", "type": "calc", "enabld": false,
         "timeout_ms": 99999999999}
      ],
      "runtime": {"max_steps": "${STEPS}"}
    },
    {
      "id": "a",
      "name": "${NAME}"
    }
  ]
}"""


def problems(text: str, env: dict[str, str] | None = None) -> list[dict[str, Any]]:
    with pytest.raises(ConfigValidationError) as caught:
        load_agents(text, env=env or {})
    return [dict(problem) for problem in caught.value.problems]


def places(found: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(problem["path"], problem["line"]) for problem in found]


def test_everything_that_is_wrong_is_told_at_once_with_its_line() -> None:
    """An unknown key hides nothing beside it, and one wrong agent none in another."""
    found = problems(WRONG_EVERYWHERE, {"STEPS": "many"})

    assert places(found) == [
        ("agnts", 3),
        ("agents[0].memory", 5),
        ("agents[0].name", 5),
        ("agents[0].id", 6),
        ("agents[0].nmae", 7),
        ("agents[0].llm.temperature", 8),
        ("agents[0].llm.retry.attempts", 9),
        ("agents[0].llm.retry.max_attempts", 9),
        ("agents[0].pattern", 10),
        ("agents[0].tools[1].enabld", 13),
        ("agents[0].tools[1].id", 13),
        ("agents[0].tools[1].timeout_ms", 14),
        ("agents[0].runtime.max_steps", 16),
        ("agents[1].llm", 18),
        ("agents[1].memory", 18),
        ("agents[1].pattern", 18),
        ("agents[1].id", 19),
        ("agents[1].name", 20),
    ]
    hints = {problem["path"]: problem["hint"] for problem in found}
    assert hints["agnts"] == "did you mean 'agents'?"
    assert hints["agents[0].nmae"] == "did you mean 'name'?"
    assert hints["agents[0].tools[1].enabld"] == "did you mean 'enabled'?"


def test_the_text_has_a_line_for_each_problem() -> None:
    """For people: the file, then line, path, what is wrong, what was found and what would be right."""
    with pytest.raises(ConfigValidationError) as caught:
        load_agents('{\n"agents": [\n{"id": "a", "name": 5}]}', env={})

    assert str(caught.value).splitlines() == [
        "agents file:",
        '  line 3: agents[0].llm: an agent needs a model, for example {"provider": "mock"}',
        "  line 3: agents[0].memory: field required",
        "  line 3: agents[0].name: input should be a valid string; found 5",
        "  line 3: agents[0].pattern: field required",
    ]


def test_an_agent_that_is_written_correctly_is_read_beside_one_that_is_not() -> None:
    """A worker serves it, and knows what is wrong with the other."""
    file = read_agents_file(json.dumps({"agents": [{**GOOD, "id": "bad", "queu": "q"}, GOOD]}), env={})

    assert file.config is not None
    assert [agent.id for agent in file.config.agents] == ["good"]
    assert [(file.agent_id(problem), problem.path) for problem in file.problems] == [
        ("bad", ("agents", 0, "queu"))
    ]


def test_of_two_agents_with_one_id_neither_is_read() -> None:
    """Nobody can know which of them is meant."""
    file = read_agents_file(json.dumps({"agents": [{**GOOD, "id": "b"}, GOOD, GOOD]}), env={})

    assert file.config is not None
    assert [agent.id for agent in file.config.agents] == ["b"]
    assert [problem.path for problem in file.problems] == [("agents", 1, "id"), ("agents", 2, "id")]


@pytest.mark.parametrize("text", ["[]", '"agents"', "5", "null", '{"agents": 5}', '{"agents": [5]}'])
def test_a_document_of_another_shape_has_a_problem_with_a_line(text: str, tmp_path: Path) -> None:
    """It is JSON, and no agents file."""
    path = tmp_path / "agents.json"
    path.write_text(text)

    [line] = {problem["line"] for problem in problems_of_file(path)}
    assert line == 1


def problems_of_file(path: Path) -> list[dict[str, Any]]:
    with pytest.raises(ConfigValidationError) as caught:
        load_agents(path, env={})
    assert caught.value.file == str(path)
    return [dict(problem) for problem in caught.value.problems]


# --- variables -------------------------------------------------------------------------------------------


def test_a_variable_is_a_number_a_boolean_or_null_where_the_file_wants_one() -> None:
    """In quotes, as JSON wants it; where the file wants a text it stays one."""
    agent = {
        **GOOD,
        "name": "${NUMBER}",
        "llm": {
            "provider": "openai_compatible",
            "temperature": "${FRACTION}",
            "reasoning_model": "${NO}",
            "max_tokens": "${NOTHING}",
            "seed": "${NUMBER}",
            "model": "${NOTHING}",
        },
        "tools": [{"id": "calc", "type": "calc", "enabled": "${NO}"}],
        "runtime": {"max_steps": "${NUMBER}", "step_timeout_ms": "${UNSET:-null}"},
        "limits": {"max_cost_usd": "${FRACTION}"},
    }
    env = {"NUMBER": "7", "FRACTION": "0.5", "NO": "false", "NOTHING": "null"}

    [read] = load_agents(json.dumps({"agents": [agent]}), env=env).agents

    assert (read.name, read.llm.model) == ("7", "null")
    assert (read.llm.temperature, read.llm.reasoning_model, read.llm.max_tokens) == (0.5, False, None)
    assert (read.tools[0].enabled, read.runtime.max_steps, read.runtime.step_timeout_ms) == (False, 7, None)
    assert read.limits is not None
    assert read.limits.max_cost_usd == 0.5


def test_a_missing_variable_has_its_line_and_no_further_problem() -> None:
    """What only follows from it is not told."""
    agent = json.dumps({**GOOD, "runtime": {"max_steps": "${STEPS}"}})

    [found] = problems(f'{{"agents":\n[{agent}]}}')

    assert found == {
        "path": "agents[0].runtime.max_steps",
        "line": 2,
        "code": "config.validation",
        "message": "the environment variable STEPS is not set",
        "hint": "set it, or write ${STEPS:-default}",
    }


# --- JSON ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"agents":\n1,\n"agents": 2}', "the key 'agents' twice, at line 1 and at line 3"),
        ('{"a": {"b":\n1,\n"b": 2}}', "an object (a) has the key 'b' twice, at line 1 and at line 3"),
        (
            '{"a": 1, "a": {"b": 1,\n"b": 2}}',
            "'a' twice, at line 1 and at line 1; an object (a) has the key 'b'",
        ),
        ('{"a": 1, "\\u0061": 2}', "the key 'a' twice, at line 1 and at line 1"),
        ('{"agents":\n  NaN}', "not JSON at line 2, column 3: NaN is not JSON"),
        ('{"agents":\n  1e999}', "not allowed at line 2, column 3: it is NaN or infinite"),
        ('{"agents":\n  -1E400}', "not allowed at line 2, column 3: it is NaN or infinite"),
        (f'{{"agents":\n  {2**63}}}', "not allowed at line 2, column 3: it is an integer beyond 64 bits"),
        (f'{{"agents":\n  {10**4200}}}', "not allowed at line 2, column 3: it is an integer beyond 64 bits"),
        (
            '{"agents":\n  1' + "0" * 5_000 + "}",
            "not allowed at line 2, column 3: a number of 5,001 characters",
        ),
        ('{"agents":\n  "\\ud800"}', "not allowed at line 2, column 3: it is half of a surrogate pair"),
        ('{"agents": [],\n "\\udfff": 1}', "not allowed at line 2, column 2: it is half of a surrogate pair"),
        ('{"agents":\n  "\ud800"}', "not allowed at line 2, column 4: half of a surrogate pair"),
        ('{"agents": -Infinity}', "-Infinity is not JSON"),
        ('{"agents": ' + "[" * 100_000, "nested too deeply"),
        ('{"agents":\n' + "[" * 100 + "]" * 100 + "}", "line 2, column 100: it is nested too deeply"),
        ('{"agents": 1} x', "not JSON at line 1, column 15"),
    ],
)
def test_a_text_that_cannot_be_read_says_where(text: str, says: str) -> None:
    """Both lines of a key that an object has twice: the second would silently win."""
    with pytest.raises(ConfigLoadError) as caught:
        load_agents(text, env={})
    assert says in str(caught.value)


def test_a_mark_at_the_beginning_of_the_file_is_not_part_of_it(tmp_path: Path) -> None:
    """Some editors write one."""
    path = tmp_path / "agents.json"
    path.write_text(json.dumps({"agents": [GOOD]}), encoding="utf-8-sig")

    assert load_agents(path, env={}).agents[0].id == "good"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_every_part_of_a_document_has_its_line(value: Any) -> None:
    """With one token a line, the lines of the parts are in the order of the parts, and none is missing."""
    read = read_json(json.dumps(value, indent=1, ensure_ascii=False))
    paths = list(_paths(value, ()))

    assert read.value == value
    assert list(read.lines) == paths
    lines = [read.line(path) for path in paths]
    assert lines == sorted(lines)
    assert len(set(lines)) == len(lines)


def _paths(value: Any, path: tuple[str | int, ...]) -> Any:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _paths(item, (*path, key))


def test_a_key_twice_is_found_by_the_reader_itself() -> None:
    """Also in a list of objects, and not in two objects beside each other."""
    assert read_json('[{"a": 1}, {"a": 2}]').line((1, "a")) == 1
    with pytest.raises(NotJson, match=r"\(\[1\]\)"):
        read_json('[{"a": 1}, {"a": 2, "a": 3}]')
