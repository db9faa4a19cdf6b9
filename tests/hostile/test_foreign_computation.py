"""Computation whose cost is chosen by a producer, a model or the author of a record."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest

from tests.hostile.matrix import COMPUTATION
from tests.hostile.schemas import (
    CATASTROPHE,
    CATASTROPHIC,
    HARMLESS_BUT_LARGE,
    MULTIPLIED,
)
from tests.hostile.table import Attack, Case, cases, hostile
from tests.support.refused_schemas import REFUSED, nested

FETCHED = ("tool.permanent", "tool.unavailable", "tool.error")

SCHEMAS = {name: schema for name, (schema, _) in REFUSED.items() if isinstance(schema, dict)}
AS_JSON = {
    name: schema
    for name, schema in SCHEMAS.items()
    if name not in ("not JSON", "NaN", "deeper than Python's stack")
}
"""Schemas that can be written into a message or a record; the same check is applied to both."""
EVEN, ODD = (dict(list(AS_JSON.items())[begin::2]) for begin in (0, 1))


def of_a_message(schema: Any) -> Any:
    def change(envelope: dict[str, Any]) -> dict[str, Any]:
        (request,), *rest = json.loads(envelope["body"])
        return {**envelope, "body": json.dumps([[{**request, "output_type": schema}], *rest])}

    return change


def of_a_record(schema: Any) -> Any:
    def change(redis: Any, keys: Any, run_id: str) -> None:
        request = json.loads(redis.hget(keys("run", run_id), "request"))
        redis.hset(keys("run", run_id), "request", json.dumps({**request, "output_type": schema}))

    return change


NAMES = {
    "a long name": "x" * 100_000,
    "a name like another": "temperatur" * 5_000,
    "variables without an end": "${A:-" * 5_000,
    "quotes": '"\\' * 20_000,
}
PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "a field": lambda name: {name: 1},
    "an option of the model": lambda name: {"llm": {"provider": "mock", name: 1}},
    "a provider": lambda name: {"llm": {"provider": name}},
    "a field of a tool": lambda name: {"tools": [{"id": "calc", "type": "calc", name: 1}]},
    "the id of a tool": lambda name: {"tools": [{"id": name, "type": "calc"}]},
}
PIECES = ("a.", "%41", "@", "/..", "?a=", ":1", "[::", "xn--", "é", "#", "\\", "&amp;", "user:", "//", ";a")
URLS = [f"{scheme}{piece * 5_000}" for piece in PIECES for scheme in ("http://", "http://h/")]
GLOBS = ("[a-z", "*a", "[!a]", "?", "*[!a-z")
OPTIONS = ("--since", "--until", "--label", "--limit")
"""Options of `runs` that are more than compared; each refuses a text of 10,000 pieces."""

TABLE = [
    *cases("request", {name: ({"output_type": one}, "request.invalid") for name, one in SCHEMAS.items()}),
    *cases("message", {name: (of_a_message(one), "request.invalid") for name, one in EVEN.items()}),
    *cases("record", {name: (of_a_record(one), "request.invalid") for name, one in ODD.items()}),
    *cases(
        "agents_file",
        {
            f"{place}, {name}": (
                make(text),
                ("config.validation", "loaded"),
            )  # a model's options are read when it is made
            for place, make in PLACES.items()
            for name, text in NAMES.items()
        },
    ),
    *cases(
        "cli",
        {
            f"{option} {piece}": (["runs", option, piece * 10_000], ("exit 1", "exit 2 request.invalid"))
            for option in OPTIONS
            for piece in GLOBS
        },
    ),
    *cases("url", {f"{url[:12]} {n}": (url, ("tool.validation", *FETCHED)) for n, url in enumerate(URLS)}),
]


@hostile(COMPUTATION, TABLE)
def test_what_costs_too_much_is_refused_at_each_entry_point(case: Case, attack: Attack) -> None:
    """A worker rejects what another producer wrote into a message or record, with the same code."""
    attack(case)


# --- answers and arguments -------------------------------------------------------------------------------

LARGE = 20_000  # characters: what needs the square of it takes seconds

NASTY: dict[str, Any] = {
    "a long text": "a" * LARGE,
    "a text for the pattern": CATASTROPHIC,
    "a tree": nested(90, "a"),
    "a wide object": {f"k{n}": n for n in range(2_000)},
    "many items": [{"n": n} for n in range(2_000)],
    "large numbers": [10**300, -(2**63), 1e308, 5e-324],
    "a long name": {"a" * LARGE: 1},
    "names like the known ones": {f"shor{n}": 1 for n in range(1_000)},
}
TO_COMPUTE = (
    "2**10**10",
    "9**9**9",
    "factorial(10**9)",
    "(" * 240 + "1" + ")" * 240,
    "1e308*10",
    "round(1, -10**9)",
    "sum([9**999]*99)",
    "0x" + "f" * 480,
    "-" * 490 + "1",
)
DATES = ("1" * LARGE, "Mon, " * (LARGE // 5), "2024-" * (LARGE // 5), " " * LARGE)
JSON = ("[" * LARGE, '{"a":' * (LARGE // 5), "1" * 5_000, '"' + "\\" * (LARGE - 1))
BUILTIN: dict[str, list[dict[str, Any]]] = {
    "calc": [{"expression": text} for text in TO_COMPUTE],
    "current_time": [{"timezone": "a/" * LARGE}, {"timezone": "../" * LARGE}, {"timezone": "x" * LARGE}],
    "date_diff": [{"date1": text, "date2": text} for text in DATES],
    "date_parse": [{"date": text} for text in DATES],
    "json_parse": [{"text": text} for text in JSON],
    "builtin_search": [{"query": "a " * 500}, {"query": "a" * LARGE}],
    "get_env": [{"key": "A" * LARGE}, {"key": "*"}, {"key": "OPENAGENTS_REDIS_URL"}],
    "host_lookup": [{"url": "//" + "[" * LARGE}, {"url": "@" * 8_000}, {"url": ":" * 8_000}],
    "min_max": [{"numbers": "1," * LARGE + "1", "action": "median"}, {"numbers": "1" * LARGE}],
    "query_param": [{"url": "http://a/?" + "&" * 8_000, "action": "list"}, {"url": "?" * LARGE, "key": "a"}],
    "random_choice": [{"choices": [[]] * 9_000, "count": 9_000}, {"choices": [1], "count": 10**300}],
    "random_int": [{"min": -(10**300), "max": 10**300}, {"count": 10**9}],
    "random_string": [{"length": 10**9}],
    "set_env": [{"key": "A=B", "value": "\0"}, {"key": "A", "value": "a" * LARGE * 2}],
    "url_build": [{"host": "a" * LARGE}, {"host": "a", "query": {f"k{n}": ["é" * 9] * 9 for n in range(99)}}],
    "url_parse": [{"url": "http://" + "[" * LARGE}, {"url": "http://" + "a." * 4_000}],
    "execute_command": [
        {"command": "head -c 100000000 /dev/zero", "timeout": 1e300},
        {"command": "setsid sleep 600 & exit 3"},
        {"command": "sleep 600", "timeout": 0.1},
    ],
    "shell_exec": [{"command": ["a"] * LARGE}, {"command": "'" * LARGE}, {"command": ["\ud800"]}],
    "text_transform": [{"text": "ß" * LARGE, "operation": "upper"}],
    "list_files": [{"path": "a/" * LARGE}, {"path": ".", "pattern": "*a" * LARGE}, {"path": "../" * LARGE}],
    "read_file": [{"path": "a/../" * LARGE}],
    "grep_files": [{"path": ".", "pattern": "(a+)+$"}, {"path": ".", "pattern": "(" * 5_000}],
    "http_request": [{"url": "http://" + "a." * LARGE}, {"url": "http://[" + ":" * LARGE}],
}
FIELDS_OF_STRICT = (("few", "tree"), ("short", "one"), ("step", "few"), ("tree", "short"), ("one", "step"))
"""Each value meets two of them, each of them meets three values."""
ARGUMENTS: dict[str, tuple[str, Any]] = {
    **{
        f"strict, {field}: {name}": ("strict", {field: value})
        for (name, value), fields in zip(NASTY.items(), cycle(FIELDS_OF_STRICT), strict=False)
        for field in fields
    },
    **{f"strict: {name}": ("strict", value) for name, value in NASTY.items() if isinstance(value, dict)},
    "a catastrophic pattern": ("catastrophe", {"a": CATASTROPHIC}),
    "a tree for a schema that multiplies itself": ("multiplied", nested(60, "a")),
    **{f"{tool} {n}": (tool, given) for tool, each in BUILTIN.items() for n, given in enumerate(each)},
}
TOLD = ("completed", "tool.validation", "tool.error", "tool.permanent", "tool.unavailable")

UNFIT, GIVEN_UP = "execution.output_validation", "execution.check_limit"
EMPTY, SHORT = {"type": "object", "maxProperties": 0}, {"type": "string", "maxLength": 1}
UNIQUE = {"type": "array", "uniqueItems": True}
ANSWERS: dict[str, tuple[Any, Any, str]] = {
    "a catastrophic pattern": (CATASTROPHE, CATASTROPHIC, GIVEN_UP),
    "a tree for a schema that multiplies itself": (
        {"type": "object", **MULTIPLIED},
        nested(60, "a"),
        GIVEN_UP,
    ),
    "each item with each": (UNIQUE, [{"n": n} for n in range(6_000)], GIVEN_UP),
    "a harmless schema of 55 KB": (HARMLESS_BUT_LARGE, {"field_0000": "x"}, "completed"),
    "fences in fences": ({"type": "object"}, "```json\n" + "```" * LARGE + "x", UNFIT),
    "brackets": ({"type": "array"}, "[" * LARGE, UNFIT),
    **{f"an empty object wanted, {name}": (EMPTY, value, UNFIT) for name, value in NASTY.items()},
    **{f"a short text wanted, {name}": (SHORT, value, UNFIT) for name, value in NASTY.items()},
}


@hostile(
    COMPUTATION, cases("answer", {n: ((schema, said), code) for n, (schema, said, code) in ANSWERS.items()})
)
def test_an_answer_costs_a_worker_no_more_than_its_check(case: Case, attack: Attack) -> None:
    """The run ends with a code."""
    attack(case)


@pytest.mark.allow_blocking("the model server, on a loop of the test's process, writes large arguments")
@hostile(COMPUTATION, cases("arguments", {name: (given, TOLD) for name, given in ARGUMENTS.items()}))
def test_arguments_cost_a_worker_no_more_than_their_check(case: Case, attack: Attack) -> None:
    """The model gets the error, and the run completes."""
    attack(case)
