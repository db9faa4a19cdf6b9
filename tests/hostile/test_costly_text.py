"""Texts that are crafted to make searching or parsing slow, at entry points without a schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.hostile.costly import COSTLY, LARGE
from tests.hostile.matrix import COMPUTATION
from tests.hostile.table import Attack, Case, cases, hostile

FEW = dict(list(COSTLY.items())[:20])
TIMES = ("1" * LARGE, "2024-" * (LARGE // 5), "Mon, " * (LARGE // 5), "T" * LARGE, "+" * LARGE, " " * LARGE)
LINK = {"task": "shop.mail", "args": [], "kwargs": {}, "options": {}}


def chained(levels: int) -> dict[str, Any]:
    """A task that links to a task that links to a task."""
    task = dict(LINK)
    for _ in range(levels):
        task = {**LINK, "options": {"link": [task]}}
    return task


OPTIONS = {
    **{
        f"{option}: {value[:5]!r}": ({option: value}, "request.invalid")
        for option in ("eta", "expires", "countdown")
        for value in TIMES
    },
    "tasks linked in one another": ({"link": chained(90)}, "request.invalid"),
    "tasks chained in one another": ({"chain": [chained(90)]}, "request.invalid"),
    "a long queue": ({"queue": "a.b-" * LARGE}, "request.invalid"),
    "a queue of separators": ({"queue": ":" * LARGE}, "request.invalid"),
    "a long task id": ({"task_id": "a-" * LARGE}, "request.invalid"),
    "a priority of digits": ({"priority": "9" * LARGE}, "request.invalid"),
}


def pieces(*deltas: Any, end: str = "stop") -> bytes:
    """A streamed reply of these deltas."""
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"delta": {}, "finish_reason": end}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks).encode() + b"data: [DONE]\n\n"


def call(text: str, **more: Any) -> dict[str, Any]:
    function = {"name": more.pop("name", "give"), "arguments": text}
    return {"tool_calls": [{"index": 0, "id": "c", "function": function, **more}]}


STREAMS = {
    **{name: (pieces({"content": text}, {"content": text}), "completed") for name, text in FEW.items()},
    "a text in 5,000 pieces": (pieces(*[{"content": "a"}] * 5_000), "completed"),
    "arguments in 5,000 pieces": (pieces(*[call("[")] * 5_000), ("llm.response", "tool.not_found")),
    "a name in 5,000 pieces": (pieces(*[call("", name="a")] * 5_000), ("llm.response", "tool.not_found")),
    "1,000 calls from the last to the first": (
        pieces(*({"tool_calls": [{"index": n, "id": f"c{n}"}]} for n in reversed(range(1_000)))),
        ("llm.response", "llm.too_large", "tool.not_found"),
    ),
    "5,000 lines of one event": (b"data: {\n" + b"data:\n" * 5_000 + b"data: }\n\n", "llm.connection"),
    "5,000 fields that nobody knows": (b"x: y\n" * 5_000 + pieces({"content": "a"}), "completed"),
}
ENCODED = {name: text.encode("unicode_escape").decode()[:6_000] for name, text in COSTLY.items()}
HEADERS = {
    f"{name}: {what}": ({name: text}, ("completed", "llm.connection"))
    for (what, text), name in zip(
        ENCODED.items(),
        ("retry-after", "content-type", "set-cookie", "date", "link", "x-request-id", "server-timing") * 5,
        strict=False,
    )
}
PATHS = {
    f"{path}: {name}": (f"{path}{text.encode().hex()[:4_000] if ' ' in text else text[:8_000]}", STATUSES)
    for STATUSES in [("200", "400", "403", "404", "closed")]
    for (name, text), path in zip(
        FEW.items(),
        ("/task/", "/tasks?search=", "/workers?refresh=", "/static/", "/broker?") * 4,
        strict=False,
    )
}

TABLE = [
    *cases("options", OPTIONS),
    *cases("stream", STREAMS),
    *cases("header", HEADERS),
    *cases("page", PATHS),
    *cases("tool_result", {name: (repr(text), "completed") for name, text in FEW.items()}),
    *cases("tool_error", {name: (f"Anything({text!r})", "tool.error") for name, text in FEW.items()}),
    *cases("event", {name: (f"{{'text': {text!r}}}", "completed") for name, text in COSTLY.items()}),
    *cases("state", {name: (repr({text: text[:9]}), "completed") for name, text in FEW.items()}),
]


@pytest.mark.share(of=4)
@hostile(COMPUTATION, TABLE)
def test_a_text_does_not_take_quadratic_time(case: Case, attack: Attack) -> None:
    attack(case)
