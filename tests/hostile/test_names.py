"""Names from input, at entry points where careless code would use them as keys."""

from __future__ import annotations

import json
from typing import Any

from tests.hostile.matrix import KEY
from tests.hostile.table import Attack, Case, cases, hostile
from tests.unit.test_queue_names import INVALID

OURS = [
    "oa:due",
    "oa:workers",
    "oa:run:r1",
    "oa:session_state:s1",
    "unacked",
    "agents",
    "agents.wake",
    "_kombu",
]
NAMES = list(dict.fromkeys([*OURS, *(name for name in INVALID if name)]))[:24]


def spelt(name: str) -> str:
    return ascii(name if len(name) < 40 else f"{name[:20]} and more")


def body(field: str, value: Any) -> Any:
    """The message with this field in its request."""

    def changed(envelope: dict[str, Any]) -> dict[str, Any]:
        [request], *more = json.loads(envelope["body"])
        return {**envelope, "body": json.dumps([[{**request, field: value}], *more])}

    return changed


def properties(**more: Any) -> Any:
    return lambda envelope: {**envelope, "properties": {**envelope["properties"], **more}}


def headers(**more: Any) -> Any:
    return lambda envelope: {**envelope, "headers": {**envelope["headers"], **more}}


def stored(field: str, value: str) -> Any:
    return lambda redis, keys, run_id: redis.hset(
        keys("run", run_id), field, value.encode("utf-8", "replace")
    )


def calls(name: str, id_: str) -> list[dict[str, Any]]:
    return [{"index": 0, "id": id_, "function": {"name": name, "arguments": "{}"}}]


def whole(name: str, id_: str) -> bytes:
    message = {"content": None, "tool_calls": calls(name, id_)}
    return json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}]}).encode()


def streamed(name: str, id_: str) -> bytes:
    chunk = {"choices": [{"delta": {"tool_calls": calls(name, id_)}, "finish_reason": "tool_calls"}]}
    return f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()


PLACES = ("reply_to", "correlation_id", "delivery_tag", "exchange")
REFUSED = ("completed", "request.invalid")
FIELDS = ("parent_id", "root_id", "group", "id")
ASKED = (["show"], ["watch"], ["cancel"], ["session"], ["resume", "--yes"], ["runs", "--session"],
         ["runs", "--agent"], ["runs", "--tenant"], ["runs", "--cursor"])  # fmt: skip
NOTHING = ("exit 0", "exit 1", "exit 2", "exit 2 request.invalid", "exit 2 user.agent_not_found",
"exit 2 run.not_found",
           "exit 2 session.not_found", "exit 3 run.not_found")  # fmt: skip

TABLE = [
    *cases(
        "message", {f"queue {spelt(name)}": (body("queue", name), "request.invalid") for name in NAMES[8:16]}
    ),
    *cases(
        "message",
        {
            f"{place} {spelt(name)}": (properties(**{place: name}), REFUSED)
            for place, name in zip(PLACES * 3, NAMES, strict=False)
        },
    ),
    *cases(
        "message",
        {
            f"header {field} {spelt(name)}": (
                headers(**{field: name}),
                ("completed", "gone", "request.invalid"),
            )
            for field, name in zip(FIELDS * 2, NAMES, strict=False)
        },
    ),
    *cases(
        "record",
        {
            f"{field} {spelt(name)}": (stored(field, name), ("completed", "record.unreadable"))
            for field, name in zip(("queue", "tenant", "agent", "uid", "worker") * 5, NAMES, strict=False)
        },
    ),
    *cases("reply", {spelt(name): (whole(name, "c"), "tool.not_found") for name in NAMES[::2]}),
    *cases("reply", {f"id {spelt(name)}": (whole("x", name), "tool.not_found") for name in NAMES[::2]}),
    *cases("stream", {spelt(name): (streamed(name, "c"), "tool.not_found") for name in NAMES[::2]}),
    *cases("stream", {f"id {spelt(name)}": (streamed("x", name), "tool.not_found") for name in NAMES[::2]}),
    *cases("event", {spelt(name): ((name, "{'n': 1}"), ("completed", "step.too_large")) for name in NAMES}),
    *cases(
        "state",
        {spelt(name): (("states", repr({name: 1})), ("completed", "step.too_large")) for name in NAMES[:14]},
    ),
    *cases("artifact", {spelt(name): (repr(name), ("completed", "step.too_large")) for name in NAMES[14:]}),
    *cases(
        "cli",
        {
            f"{' '.join(asked)} {spelt(name)}": ([*asked, name], NOTHING)
            for asked, name in zip(ASKED * 3, NAMES, strict=False)
        },
    ),
]


@hostile(KEY, TABLE)
def test_no_name_from_input_becomes_a_key(case: Case, attack: Attack) -> None:
    attack(case)
