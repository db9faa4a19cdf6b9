"""Size limits of producers, records, tools, commands and pages."""

from __future__ import annotations

import json
from typing import Any

from tests.hostile.matrix import UNBOUND
from tests.hostile.table import Attack, Case, cases, hostile

MB = 1024 * 1024
LINK = {"task": "shop.mail", "args": [], "kwargs": {}, "options": {}}
TOO_LARGE = ("request.too_large", "request.invalid")

REQUESTS = {
    **{
        f"2 MB of {field}": ({field: "x" * 2 * MB}, TOO_LARGE)
        for field in ("agent_id", "session_id", "run_id", "input_text", "queue", "tenant", "parent_run_id")
    },
    **{
        f"2 MB in {field}": ({field: {"x": "y" * 2 * MB}}, TOO_LARGE)
        for field in ("metadata", "context_hints", "deps", "labels", "output_type")
    },
    **{
        f"80,000 keys in {field}": ({field: {f"k{n}": "v" * 10 for n in range(80_000)}}, TOO_LARGE)
        for field in ("metadata", "context_hints", "deps", "labels")
    },
    "100 labels": ({"labels": {f"k{n}": "v" for n in range(100)}}, "request.invalid"),
    "a label of 10,000 characters": ({"labels": {"k": "v" * 10_000}}, "request.invalid"),
    "a label's name of 10,000 characters": ({"labels": {"k" * 10_000: "v"}}, "request.invalid"),
    "300,000 numbers": ({"metadata": {"x": list(range(300_000))}}, TOO_LARGE),
    "5,000 fields that there are not": ({f"field{n}": n for n in range(5_000)}, "request.invalid"),
    "a budget of all numbers": ({"budget": {"max_steps": 2**62}}, ("request.invalid", "completed")),
}
OPTIONS = {
    **{
        f"20,000 {option}": ({option: [LINK] * 20_000}, TOO_LARGE)
        for option in ("link", "link_error", "chain")
    },
    **{
        f"2 MB of {option}": ({option: {**LINK, "args": ["x" * 2 * MB]}}, TOO_LARGE)
        for option in ("link", "link_error")
    },
    "2 MB of chain": ({"chain": [{**LINK, "args": ["x" * 2 * MB]}]}, TOO_LARGE),
    "2 MB of stamps": ({"headers": {"stamps": {"x": ["y" * 2 * MB]}}}, TOO_LARGE),
    "2 MB of headers": ({"headers": {"x": "y" * 2 * MB}}, TOO_LARGE),
    "60,000 headers": ({"headers": {f"x{n}": "y" * 20 for n in range(60_000)}}, TOO_LARGE),
    "a header's name of 2 MB": ({"headers": {"y" * 2 * MB: 1}}, TOO_LARGE),
    "a task id of 2 MB": ({"task_id": "x" * 2 * MB}, TOO_LARGE),
    "a queue of 2 MB": ({"queue": "x" * 2 * MB}, TOO_LARGE),
    "an eta of 2 MB": ({"eta": "2" * 2 * MB}, TOO_LARGE),
    "an expiry of 2 MB": ({"expires": "2" * 2 * MB}, TOO_LARGE),
    "a countdown of eleven years": ({"countdown": 11 * 365 * 86_400}, "request.invalid"),
    "an expiry in 8,000 years": ({"expires": "9999-12-31T23:59:59"}, "request.invalid"),
    "an eta in 8,000 years": ({"eta": "9999-12-31T23:59:59+00:00"}, "request.invalid"),
    "a priority of all numbers": ({"priority": 2**62}, "request.invalid"),
    "a link of 300,000 arguments": ({"link": {**LINK, "args": list(range(300_000))}}, TOO_LARGE),
    "a link of 300,000 names": (
        {"link": {**LINK, "kwargs": {f"k{n}": n for n in range(300_000)}}},
        TOO_LARGE,
    ),
    "a link's task of 2 MB": ({"link": {**LINK, "task": "t" * 2 * MB}}, TOO_LARGE),
    "a link's queue of 2 MB": ({"link": {**LINK, "options": {"queue": "q" * 2 * MB}}}, TOO_LARGE),
}


def field(name: str, value: str) -> Any:
    return lambda redis, keys, run_id: redis.hset(keys("run", run_id), name, value)


def of_request(name: str, value: Any) -> Any:
    def changed(redis: Any, keys: Any, run_id: str) -> None:
        request = json.loads(redis.hget(keys("run", run_id), "request"))
        redis.hset(keys("run", run_id), "request", json.dumps({**request, name: value}))

    return changed


def entries(kind: str, count: int, value: str) -> Any:
    """Add this number of entries to a key of the run or of its session, for example its journal."""

    def changed(redis: Any, keys: Any, run_id: str) -> None:
        session = redis.hget(keys("run", run_id), "session")
        key = keys(kind, run_id if kind in ("journal", "facts", "events") else session)
        with redis.pipeline() as at_once:
            match kind:
                case "transcript" | "artifacts" | "journal":
                    at_once.rpush(key, *[value] * count)
                case "session_state" | "facts":
                    at_once.hset(key, mapping={f"k{n}": value for n in range(count)})
                case _:
                    raise ValueError(kind)
            at_once.expire(key, 600)
            at_once.execute()

    return changed


KEPT = ("completed", "record.unreadable", "request.invalid", "request.too_large", "step.too_large")
MESSAGE = json.dumps({"role": "user", "content": "x" * 400})
RECORDS = {
    **{
        f"3 MB of {name}": (field(name, "x" * 3 * MB), KEPT)
        for name in ("request", "canvas", "usage", "last_error", "labels", "tenant", "agent", "reason_code")
    },
    **{
        f"3 MB of digits for {name}": (field(name, "9" * 3 * MB), KEPT)
        for name in ("attempt", "retries", "life", "steps", "active_ms")
    },
    "a request of 3 MB": (of_request("input_text", "x" * 3 * MB), KEPT),
    "metadata of 3 MB": (of_request("metadata", {"x": "y" * 3 * MB}), KEPT),
    "20,000 labels": (of_request("labels", {f"k{n}": "v" for n in range(20_000)}), KEPT),
    "5,000 messages": (entries("transcript", 5_000, MESSAGE), KEPT),
    "a message of 3 MB": (entries("transcript", 1, json.dumps({"role": "user", "content": "x" * 3 * MB})),
    KEPT),
    "2,000 artifacts": (entries("artifacts", 2_000, "{}"), KEPT),
    "5,000 values of the session": (entries("session_state", 5_000, '"x"'), KEPT),
    "a value of the session of 3 MB": (entries("session_state", 1, json.dumps("x" * 3 * MB)), KEPT),
    "5,000 facts": (entries("facts", 5_000, "{}"), KEPT),
}  # fmt: skip

RESULTS = {
    "2 MB of text": "'x' * 2_000_000",
    "2 MB of umlauts": "'\\xfc' * 1_000_000",
    "2 MB of quotes": "'\"' * 2_000_000",
    "2 MB of zeros": "'\\0' * 2_000_000",
    "200,000 surrogates": "'\\ud800' * 200_000",
    "2 MB of bytes": "b'x' * 2_000_000",
    "100,000 numbers": "list(range(100_000))",
    "60,000 lists": "[[] for _ in range(60_000)]",
    "one list 60,000 times": "[[1]] * 60_000",
    "60,000 keys": "{str(n): n for n in range(60_000)}",
    "60,000 keys that are numbers": "{n: n for n in range(60_000)}",
    "a key of 2 MB": "{'x' * 2_000_000: 1}",
    "a set": "set(range(60_000))",
    "a range without end": "range(10 ** 12)",
    "an iterator without end": "__import__('itertools').count()",
    "a generator without end": "(n for n in iter(int, 1))",
    "a number of 100,000 digits": "10 ** 100_000",
    "floats": "[0.1] * 60_000",
    "objects": "[{'a': [{}]}] * 20_000",
    "lists that double": "doubled(90)",
    "lists that double around an object": "doubled(90, {1, 2})",
    "a circle": "(lambda x: x.append(x) or x)([])",
    "a circle of objects": "(lambda x: x.update(x=x) or x)({})",
}
LOOPS = {
    name: source
    for name, source in RESULTS.items()
    if "without end" in name or "double" in name or "circle" in name
}
LEFT = ("completed", "step.too_large", "step.too_deep", "tool.error")

LONG = 100_000  # one argument of a process has 128 KB at most
COMMANDS = {
    **{
        f"{' '.join(command)} and {LONG:,} letters": ([*command, "x" * LONG], ("exit 0", "exit 1",
        "exit 2 request.invalid", "exit 3 request.invalid", "exit 2 config.load", "exit 2 config.error",
        "exit 2 user.agent_not_found", "exit 2 run.not_found", "exit 2"))
        for command in (
            ["show"], ["watch"], ["cancel"], ["cancel", "r1", "--reason"], ["session"], ["resume", "--yes"],
            ["runs", "--agent"], ["runs", "--session"], ["runs", "--tenant"], ["runs", "--label"],
            ["runs", "--code"], ["runs", "--since"], ["runs", "--cursor"], ["run"], ["run", "clerk", "x",
            "--queue"],
            ["validate"], ["sessions", "--cursor"],
        )
    },
    "5,000 labels": (["runs", *["--label", "a=b"] * 5_000], ("exit 0", "exit 1", "exit 2 request.invalid")),
    "1,000 runs to resume": (["resume", "--yes", *(f"r{n}" for n in range(1_000))], ("exit 1", "exit 2",
    "exit 3", "exit 2 request.invalid")),
    "a page of a million runs": (["runs", "--limit", "1000000"], ("exit 1", "exit 2 request.invalid")),
    "states": (["runs", *["--state", "failed"] * 5_000], ("exit 0", "exit 1", "exit 2 request.invalid")),
}  # fmt: skip


def asked(head: str, body: bytes = b"") -> bytes:
    return head.replace("\n", "\r\n").encode() + body


GET = "GET / HTTP/1.1\nhost: 127.0.0.1\nconnection: close\n"
POST = "POST /tasks/datatable HTTP/1.1\nhost: 127.0.0.1\nconnection: close\n"
PAGES = {
    "a path of 60 KB": "/task/" + "x" * 60_000,
    "a path of 1 MB": "/task/" + "x" * MB,
    "a query of 60 KB": "/tasks?x=" + "y" * 60_000,
    "20,000 parameters": "/tasks?" + "&".join(f"a{n}=" for n in range(8_000)),
    "one parameter 20,000 times": "/tasks?" + "a=b&" * 10_000,
    "a header of 60 KB": asked(GET + "x: " + "y" * 60_000 + "\n\n"),
    "a header of 1 MB": asked(GET + "x: " + "y" * MB + "\n\n"),
    "a header's name of 1 MB": asked(GET + "x" * MB + ": y\n\n"),
    "10,000 headers": asked(GET + "".join(f"x{n}: y\n" for n in range(10_000)) + "\n"),
    "a cookie of 60 KB": asked(GET + "cookie: " + "a=b;" * 15_000 + "\n\n"),
    "a body of 1 GB that does not come": asked(POST + "content-length: 1000000000\n\n", b"x"),
    "a body of 20 digits": asked(POST + "content-length: 99999999999999999999\n\n", b"x"),
    "a body of 5,000 digits": asked(POST + "content-length: " + "9" * 5_000 + "\n\n", b"x"),
    "a form of 100,000 fields": asked(
        POST + "content-type: application/x-www-form-urlencoded\ncontent-length: 400000\n\n",
        b"a=b&" * 100_000
    ),
    "a form of 10,000 parts": asked(
        POST + "content-type: multipart/form-data; boundary=x\ncontent-length: 50000\n\n", b"--x\r\n" * 10_000
    ),
    "10,000 chunks": asked(POST + "transfer-encoding: chunked\n\n", b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n"),
    "a chunk of 20 digits": asked(POST + "transfer-encoding: chunked\n\n", b"f" * 20 + b"\r\nx\r\n"),
    "a body in gzip": asked(POST + "content-encoding: gzip\ncontent-length: 4\n\n", b"\x1f\x8b\x08\x00"),
    "a page of a million tasks": "/tasks?limit=1000000",
    "a page of 5,000 digits": "/tasks?limit=" + "9" * 5_000,
    "a part from 5,000 digits on": asked(GET.replace(" / ",
    " /static/css/flower.css ") + "range: bytes=" + "9" * 5_000 + "-\n\n"),
}  # fmt: skip
STATUSES = (
    "200",
    "206",
    "400",
    "401",
    "403",
    "404",
    "405",
    "411",
    "413",
    "414",
    "416",
    "431",
    "500",
    "501",
    "closed",
)

TABLE = [
    *cases("request", REQUESTS),
    *cases("options", OPTIONS),
    *cases("record", RECORDS),
    *cases("tool_result", {name: (source, LEFT) for name, source in RESULTS.items()}),
    *cases("event", {name: (f"{{'x': {source}}}", ("completed", "step.too_large", "tool.error")) for name,
    source in LOOPS.items()}),
    *cases("state", {name: (source, LEFT) for name, source in RESULTS.items()}),
    *cases("cli", COMMANDS),
    *cases("page", {name: (path, STATUSES) for name, path in PAGES.items()}),
    *cases("header", {"a million set-cookies": ({f"set-cookie-{n}": "a=b" for n in range(5_000)},
    ("completed", "llm.connection"))}),
]  # fmt: skip


@hostile(UNBOUND, TABLE)
def test_each_entry_point_has_a_bound(case: Case, attack: Attack) -> None:
    attack(case)
