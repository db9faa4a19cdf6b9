"""One invalid element among valid ones: the valid ones are neither lost nor delayed."""

from __future__ import annotations

import json
from typing import Any

from tests.hostile.matrix import ELEMENT
from tests.hostile.table import Attack, Case, cases, hostile
from tests.hostile.world import World

HALF = "\ud800"
LINK = {"task": "shop.mail", "args": [], "kwargs": {}, "options": {"queue": "shop"}}
BAD_LINKS: dict[str, Any] = {
    "None": None, "a number": 7, "a name": "shop.mail", "a list": [], "nothing": {}, "no task": {"args": []},
    "a task that is a number": {"task": 7}, "a half": {**LINK, "args": [HALF]}, "arguments": {**LINK,
    "args": 7},
    "names": {**LINK, "kwargs": 7}, "options": {**LINK, "options": 7}, "NaN": {**LINK,
    "args": [float("nan")]},
    "an object": {**LINK, "args": [object()]}, "a queue": {**LINK, "options": {"queue": "oa:due"}},
    "a key that is a half": {**LINK, "kwargs": {HALF: 1}}, "depth": {**LINK, "args": [[[[]]] * 9,
    json.loads("[" * 120 + "]" * 120)]},
    "a large number": {**LINK, "args": [2**70]}, "an unknown kind": {**LINK, "subtask_type": "none"},
    "a group of nothing": {**LINK, "subtask_type": "group"}, "a set": {**LINK, "args": [{1}, print]},
}  # fmt: skip

GOOD = {"index": 0, "id": "a", "function": {"name": "give", "arguments": '{"what":"returns","value":"1"}'}}
LAST = {"index": 2, "id": "z", "function": {"name": "give", "arguments": '{"what":"returns","value":"2"}'}}
BAD_CALLS: dict[str, Any] = {
    "no tool": {"function": {"name": "none", "arguments": "{}"}},
    "no name": {"function": {"arguments": "{}"}},
    "a name that is a number": {"function": {"name": 7, "arguments": "{}"}}, "nothing": {},
    "no function": {"id": "b"}, "a function that is null": {"function": None},
    "a function that is a list": {"function": []},
    "arguments that are null": {"function": {"name": "give", "arguments": None}},
    "arguments that are a number": {"function": {"name": "give", "arguments": 7}},
    "arguments that are a list": {"function": {"name": "give", "arguments": "[]"}},
    "arguments that are half": {"function": {"name": "give", "arguments": '{"what"'}},
    "arguments too few": {"function": {"name": "give", "arguments": "{}"}},
    "arguments too many": {"function": {"name": "give",
    "arguments": '{"what":"returns","value":"1","more":1}'}},
    "arguments of another type": {"function": {"name": "give", "arguments": '{"what":[],"value":{}}'}},
    "the same id": {"id": "a", "function": {"name": "give",
    "arguments": '{"what":"raises","value":"OSError()"}'}},
    "a tool that raises": {"function": {"name": "give",
    "arguments": '{"what":"raises","value":"KeyError(1)"}'}},
    "a tool that returns no JSON": {"function": {"name": "give",
    "arguments": '{"what":"returns","value":"object()"}'}},
    "a tool that is deep": {"function": {"name": "give",
    "arguments": '{"what":"returns","value":"nested(300)"}'}},
    "a tool that stops": {"function": {"name": "give",
    "arguments": '{"what":"raises","value":"StopIteration()"}'}},
    "another type": {"type": "none", "function": {"name": "give", "arguments": "{}"}},
}  # fmt: skip


def calls(bad: Any) -> list[Any]:
    return [GOOD, {"index": 1, "id": "b", **bad}, LAST]


def whole(bad: Any) -> bytes:
    message = {"content": None, "tool_calls": calls(bad)}
    return json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}]}).encode()


def streamed(bad: Any) -> bytes:
    chunk = {"choices": [{"delta": {"tool_calls": calls(bad)}, "finish_reason": "tool_calls"}]}
    return f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()


BAD_VALUES = (
    "nan", "inf", "10**5000", "2**70", r"'\ud800'", r"b'\xff'", "object()", "print", "nested(300)",
    "{(1, 2): 3}",
    "{1: 2}", "explodes(dict, KeyError(1))", "explodes(list, ValueError())", "explodes(str, OSError())",
    "explodes(object, RecursionError())", "doubled(40)", "ValueError('x')", "1j", "range(3)", "...",
    "'x' * 2_000_000",
)  # fmt: skip
LEFT = ("completed", "tool.error", "step.too_large", "step.too_deep")
ASKED_AGAIN = (
    "tool.not_found",
    "llm.response",
    "execution.max_steps",
    "tool.error",
    "completed",
    "user.max_steps",
)
IDS = ("", " ", "none", HALF, "\0", "oa:due", "-x", "--yes", "x" * 9_000, "r\n1", "\x1b[2J", "ü", "%", "*",
"[a", "..",
       "9" * 400, "NaN", "{}", "\u202e")  # fmt: skip
RESUMED = ("exit 1", "exit 2", "exit 2 request.invalid", "exit 2 run.not_found", "exit 3 run.not_found")

TABLE = [
    *cases("options", {f"link {n}": ({"link": [LINK, bad, LINK]}, "request.invalid") for n,
    bad in list(BAD_LINKS.items())[:10]}),
    *cases("options", {f"chain {n}": ({"chain": [LINK, bad]}, "request.invalid") for n,
    bad in list(BAD_LINKS.items())[10:]}),
    *cases("reply", {name: (whole(bad), ASKED_AGAIN) for name, bad in BAD_CALLS.items()}),
    *cases("stream", {name: (streamed(bad), ASKED_AGAIN) for name, bad in BAD_CALLS.items()}),
    *cases("event", {value: (("each", f"[1, {value}, 2]"), LEFT) for value in BAD_VALUES}),
    *cases("state", {value: (("states", f"{{'a': 1, 'b': {value}, 'c': 2}}"), LEFT) for value in BAD_VALUES}),
    *cases("cli", {ascii(id_)[:20]: (["resume", "--yes", "none", id_, "none"], RESUMED) for id_ in IDS}),
]  # fmt: skip


@hostile(ELEMENT, TABLE)
def test_one_of_many_stops_none_of_the_others(case: Case, attack: Attack) -> None:
    attack(case)


def test_the_events_around_a_bad_one_are_told(world: World) -> None:
    """Every event is delivered in order; the invalid one with JSON replacements for its values."""
    handle = world.lets_tool("give", what="emits each", value="[1, nan, object(), 2]", name="custom.each")

    assert world.tool_ended(handle) == "completed"

    told = [event.payload["x"] for event in handle.events() if event.name == "custom.each"]
    assert (told[0], told[1], told[-1]) == (1, None, 2)
