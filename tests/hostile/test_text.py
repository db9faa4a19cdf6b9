"""Text, numbers and nesting: values that could not be read back are rejected or replaced.

They are rejected if they come from a producer, and replaced if they come from elsewhere; the table in
`openagents_worker.jsontext` lists both. The same values go through every entry point. Each value goes to one
place of its entry point, the next value to the next place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from tests.hostile.entry_points import Alter
from tests.hostile.matrix import TEXT
from tests.hostile.table import Attack, Case, cases, hostile
from tests.hostile.world import RawReply, World
from tests.support.deployment import PATIENCE_S

Codes = str | tuple[str, ...]
Inputs = dict[str, tuple[Any, Codes]]

HALF = "\ud800"
DIGITS = "9" * 5_000
DEPTHS = (101, 150, 254, 5_000)  # one beyond ours, what is of old, beyond pydantic's, beyond Python's stack


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def placed(places: Sequence[str], values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """A name, a place and a value for each value."""
    for place, (name, value) in zip(cycle(places), values.items(), strict=False):
        yield f"{place}: {name}", place, value


# --- a producer ------------------------------------------------------------------------------------------

NASTY: dict[str, Any] = {
    "half of a pair": HALF,
    "half of a pair in a text": f"a{HALF}b",
    "the other half": "\udfff",
    "many digits": 10**5000,
    "beyond 64 bits": 2**63,
    "below 64 bits": -(2**63) - 1,
    "NaN": math.nan,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    **{f"{levels} levels": nested(levels) for levels in DEPTHS},
}
IDS = ("agent_id", "session_id", "run_id", "input_text", "queue", "tenant", "deps", "parent_run_id")
PLACES = ("metadata", "context_hints", "labels", "output_type")

REQUESTS: Inputs = {
    **{name: ({field: value}, "request.invalid") for name, field, value in placed(IDS, NASTY)},
    **{name: ({field: {"x": value}}, "request.invalid") for name, field, value in placed(PLACES, NASTY)},
    "a name: half of a pair": ({"metadata": {HALF: 1}}, "request.invalid"),
    "a budget of many digits": ({"budget": {"max_steps": 10**5000}}, "request.invalid"),
    "a budget of a century": ({"budget": {"max_duration_ms": 10**13}}, "request.invalid"),
    "98 levels": ({"metadata": {"x": nested(97)}}, "completed"),
    "64 bits": ({"metadata": {"x": [2**63 - 1, -(2**63), 1e308, "😀\0"]}}, "completed"),
}
NO_TIMES = {
    "NaN": math.nan,
    "many digits": 10**5000,
    "eleven years": 11 * 365 * 24 * 3600,
    "half of a pair": HALF,
}
NO_SIGNATURES = {
    "a number": 7,
    "a name": "tasks.note",
    "a number for a task": {"task": 7},
    "half of a pair": {"task": "t", "args": [HALF]},
    "an unknown kind": {"task": "t", "subtask_type": "none"},
    "a list in a list": [[{"task": "t"}]],
}
OPTIONS: Inputs = {
    **{f"queue: {name}": ({"queue": value}, "request.invalid") for name, value in NASTY.items()},
    **{f"{option}: {name}": ({option: value}, "request.invalid")
       for option in ("countdown", "eta", "expires") for name, value in NO_TIMES.items()},
    **{f"{option}: {name}": ({option: value}, "request.invalid")
       for option in ("link", "link_error", "chain") for name, value in NO_SIGNATURES.items()},
    "a header": ({"headers": {"x": HALF}}, "request.invalid"),
    "headers that are none": ({"headers": 7}, "request.invalid"),
    "a priority": ({"priority": 10**5000}, "request.invalid"),
    "a task id": ({"task_id": HALF}, "request.invalid"),
}  # fmt: skip


@hostile(TEXT, [*cases("request", REQUESTS), *cases("options", OPTIONS)])
def test_a_producer_is_told_what_is_wrong(case: Case, attack: Attack) -> None:
    attack(case)


# --- the broker ------------------------------------------------------------------------------------------

TEXTS: dict[str, str] = {  # as JSON
    "half of a pair": r'"\ud800"',
    "half of a pair in a text": r'"a\udfffb"',
    "beyond 64 bits": str(2**63),
    "many digits": DIGITS,
    "NaN": "NaN",
    "minus infinite": "-Infinity",
    "what overflows": "1e999",
    **{f"{levels} levels": "[" * levels + "1" + "]" * levels for levels in DEPTHS},
    "objects in one another": '{"x":' * 300 + "1" + "}" * 300,
    "endless lists": "[" * 100_000,
}


def body(envelope: dict[str, Any], field: str, text: str) -> dict[str, Any]:
    """The message with this JSON as a field of its request."""
    [request], *more = json.loads(envelope["body"])
    request[field] = "HERE"
    given = text if field == "input_text" else f'{{"x":{text}}}'
    return {**envelope, "body": json.dumps([[request], *more]).replace('"HERE"', given)}


def with_header(name: str, value: Any) -> Any:
    return lambda envelope: {**envelope, "headers": {**envelope["headers"], name: value}}


def with_body(field: str, text: str) -> Any:
    return lambda envelope: body(envelope, field, text)


MESSAGES: Inputs = {
    **{
        name: (with_body(field, text), "request.invalid")
        for name, field, text in placed(("metadata", "input_text"), TEXTS)
    },
    **{
        f"header {header}: {name}": (with_header(header, value), "request.invalid")
        for header in ("expires", "callbacks", "errbacks", "root_id")
        for name, value in {"half of a pair": HALF, "a number": 7}.items()
    },
    "header id: half of a pair": (with_header("id", HALF), "gone"),
    "header id: a number": (with_header("id", 2**70), "gone"),
    "expires in 70 years": (with_header("expires", "2099-01-01T00:00:00+00:00"), "request.invalid"),
}


@hostile(TEXT, cases("message", MESSAGES))
def test_a_message_becomes_a_failed_run_or_is_gone(case: Case, attack: Attack) -> None:
    attack(case)


# --- what is stored --------------------------------------------------------------------------------------


def writes(field: str, text: str) -> Alter:
    def alter(redis: Any, keys: Any, run_id: str) -> None:
        redis.hset(keys("run", run_id), field, text)

    return alter


def writes_metadata(text: str) -> Alter:
    """Write into the stored request of a run, as an older version or another program might."""

    def alter(redis: Any, keys: Any, run_id: str) -> None:
        request = redis.hget(keys("run", run_id), "request").replace(
            '"metadata":{}', f'"metadata":{{"x":{text}}}'
        )
        writes("request", request)(redis, keys, run_id)

    return alter


def writes_bytes(kind: str, field: str) -> Alter:
    """Write bytes that are not UTF-8 into a field of the run or of its session."""

    def alter(redis: Any, keys: Any, run_id: str) -> None:
        session_id = redis.hget(keys("run", run_id), "session")
        key = keys(kind, run_id if kind == "run" else session_id)
        value = b'{"x":"\xff\xed\xa0\x80"'
        redis.rpush(key, value) if kind in ("transcript", "artifacts") else redis.hset(key, field, value)

    return alter


BYTES: Inputs = {
    **{f"bytes for {field}": (writes_bytes("run", field), codes) for field, codes in {
        "request": "record.unreadable", "canvas": "record.unreadable",
        "uid": "completed", "usage": "completed", "last_error": "completed", "labels": "completed"}.items()},
    **{f"bytes in the {kind}": (writes_bytes(kind, "x"), "record.unreadable")
       for kind in ("session_state", "transcript", "artifacts")},
}  # fmt: skip

OF_OLD = ("beyond 64 bits", "101 levels", "150 levels")
"""What the version before has stored: it is read all the same."""
UNREADABLE = {**TEXTS, "nothing": "", "a torn one": '{"agent_id":', "a list": "[]"}
RECORDS: Inputs = {
    **{f"request: {name}": (writes("request", text), "record.unreadable")
       for name, text in UNREADABLE.items()},
    **{f"metadata: {name}": (
        writes_metadata(text), "completed" if name in OF_OLD else ("record.unreadable", "completed")
    ) for name, text in TEXTS.items()},
    **{f"canvas: {name}": (writes("canvas", text), ("record.unreadable"))
       for name, text in UNREADABLE.items() if text and name != "objects in one another"},
    **{name: (writes(field, text), ("completed", "record.unreadable"))
       for name, field, text in placed(("usage", "attempt", "retries", "life", "active_ms", "steps"), TEXTS)},
}  # fmt: skip


@hostile(TEXT, cases("record", RECORDS | BYTES))
def test_a_record_ends_its_own_run(case: Case, attack: Attack) -> None:
    """Its producer gets an end, or the error that the record cannot be read. Other runs go on."""
    attack(case)


# --- the agents file -------------------------------------------------------------------------------------


def agents_file(place: str, text: str) -> str:
    one = {"id": "a", "name": "a", "llm": {"provider": "mock"}, "pattern": {"type": "react"},
           "memory": {"type": "buffer"}, place: "HERE"}  # fmt: skip
    return json.dumps({"version": "1.0", "agents": [one]}).replace('"HERE"', text)


FILES: Inputs = {
    name: (agents_file(place, text), ("config.load", "config.validation"))
    for name, place, text in [*placed(("name", "pattern", "queue"), TEXTS), *placed(("tools", "llm"), TEXTS)]
}


@hostile(TEXT, cases("agents_file", FILES))
def test_an_agents_file_is_refused(case: Case, attack: Attack) -> None:
    attack(case)


# --- the model -------------------------------------------------------------------------------------------

ANSWERS = ("completed", "llm.empty", "llm.response", "tool.not_found")
"""An invalid reply is the error of the run. For invalid arguments the model gets an error; it then calls an
unknown tool until the run ends with that error."""
FINE = '"fine"'


def reply(**parts: str) -> bytes:
    """A reply with these parts as JSON."""
    said = {
        "content": FINE,
        "calls": "[]",
        "id": "1",
        "model": "1",
        "finish": '"stop"',
        "usage": "{}",
    } | parts
    message = '{{"content":{content},"tool_calls":{calls}}}'.format_map(said)
    choices = f'[{{"message":{message},"finish_reason":{said["finish"]}}}]'
    text = '{{"id":{id},"model":{model},"choices":CHOICES,"usage":{usage}}}'.format_map(said)
    return text.replace("CHOICES", choices).encode()


def chunk(**parts: str) -> bytes:
    """The same as a stream with one piece."""
    return b"data: " + reply(**parts).replace(b'"message"', b'"delta"') + b"\n\ndata: [DONE]\n\n"


def calls(text: str) -> str:
    """A call of a tool whose arguments are this JSON text."""
    return f'[{{"index":0,"id":"c","function":{{"name":"give","arguments":{json.dumps(text)}}}}}]'


COUNTS = {**TEXTS, "below zero": "-5", "a text": '"many"', "a list": "[1]", "a fraction": "1.5"}
NOT_READ = ("many digits", "5000 levels", "endless lists")
"""Not JSON that Python reads: of a stream a torn one, which is asked for again and again."""


def parts_of(values: Mapping[str, str], *places: str) -> dict[str, dict[str, str]]:
    """A reply for each value. A stream that ends without a finish reason is incomplete and is retried."""
    counts = {name: text for name, text in COUNTS.items() if name in values or name not in TEXTS}
    tokens = {
        f"tokens: {name}": {"usage": f'{{"prompt_tokens":{text},"completion_tokens":{text}}}'}
        for name, text in counts.items()
    }
    return {name: {part: text} for name, part, text in placed(places, values)} | tokens


ARGUMENTS = {f"arguments: {name}": {"calls": calls(f'{{"x":{text}}}')} for name, text in TEXTS.items()}
REPLIES = parts_of(TEXTS, "content", "id", "model", "finish") | ARGUMENTS
READ = {name: text for name, text in TEXTS.items() if name not in NOT_READ}
STREAMS = parts_of(READ, "content", "id", "model") | ARGUMENTS


@hostile(
    TEXT,
    [
        *cases("reply", {name: (reply(**parts), ANSWERS) for name, parts in REPLIES.items()}),
        *cases("stream", {name: (chunk(**parts), ANSWERS) for name, parts in STREAMS.items()}),
    ],
)
def test_a_model_says_what_it_likes(case: Case, attack: Attack) -> None:
    attack(case)


def test_tokens_that_a_model_counts_are_none_below_zero_and_exact_above(world: World) -> None:
    """A negative count would refund a budget. A count that overflows becomes the largest valid count."""
    world.raw.reply = RawReply(reply(usage='{"prompt_tokens":-5,"completion_tokens":1e999}'))

    usage = world.submit("raw").wait(PATIENCE_S).usage

    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (0, 2**53, 2**53)


HEADERS: Inputs = {
    f"{name}: {value:.20}": ({name: value}, "completed")
    for name in ("retry-after", "retry-after-ms", "date")
    for value in (
        "1e308",
        "1e999",
        "-1",
        "nan",
        DIGITS,
        "Mon, 01 Jan 99999 00:00:00 GMT",
        "\xff",
        "²",
        "0x10",
    )
}


@hostile(TEXT, cases("header", HEADERS))
def test_headers_are_read_as_far_as_they_can_be(case: Case, attack: Attack) -> None:
    attack(case)


# --- tools -----------------------------------------------------------------------------------------------

REPLACED = {
    "half of a pair": r"'\ud800'",
    "two halves": r"'\ud83d\ude00'",
    "half of a pair as a key": r"{'\udfff': 1}",
    "beyond 64 bits": "2**63",
    "below 64 bits": "-2**63-1",
    "many digits": "10**5000",
    "many digits in a list": "[1, [2, 10**5000]]",
    "NaN": "nan",
    "infinite": "{'x': inf}",
    "minus infinite": "[-inf]",
    "a number as a key": "{1: 2}",
    "a pair": "(1, (2, nan))",
    "99 levels": "nested(99)",
}
TOO_DEEP = {f"{levels} levels": f"nested({levels})" for levels in (*DEPTHS, 50_000)}
NOT_JSON = {
    "an object": "object()",
    "bytes": r"b'\xff'",
    "a function": "print",
    "an object in a list": "[1, object()]",
    "a key that is a pair": "{(1, 2): object()}",
}


def outcomes(not_json: Codes) -> Iterator[tuple[str, tuple[str, Codes]]]:
    for group, codes in ((REPLACED, "completed"), (TOO_DEEP, "step.too_deep"), (NOT_JSON, not_json)):
        for name, source in group.items():
            yield name, (source, codes)


ERRORS: Mapping[str, tuple[str, Codes]] = {
    f"{kind}: {name}": (f"{kind}({source})", "tool.error")
    for kind in ("Anything", "KeyError")
    for name, source in {**REPLACED, **NOT_JSON, "900 levels": "nested(900)"}.items()
}
EVENTS: Mapping[str, tuple[Any, Codes]] = {
    name: (f"{{'x': {source}}}", "completed") for name, source in {**REPLACED, **TOO_DEEP, **NOT_JSON}.items()
} | {"a name: half of a pair": ((HALF, "{}"), "completed")}


@hostile(TEXT, [
    *cases("tool_result", dict(outcomes("tool.error"))),
    *cases("state", dict(outcomes("step.too_large"))),
    *cases("artifact", dict(outcomes("tool.error"))),
    *cases("tool_error", ERRORS),
    *cases("event", EVENTS),
])  # fmt: skip
def test_a_tool_leaves_what_it_likes(case: Case, attack: Attack) -> None:
    attack(case)


# --- people ----------------------------------------------------------------------------------------------

NO_IDS = (
    *("9" * digits for digits in (19, 20, 21, 100, 5_000)),
    *("-1", "+1", "1.5", "1e3", "0x10", "1-0", "1 2", "one", "NaN", "²", "\u0663", "½", "\uff11"),
    *(HALF, f"1{HALF}", "\0", "1_000"),
)
EVENT_IDS: Inputs = {f"{id_[:8]!a} of {len(id_)}": (id_, "request.invalid") for id_ in NO_IDS} | {
    "18 digits": ("9" * 18, "completed"),
    "nothing": ("", "completed"),
}


@hostile(TEXT, cases("last_event_id", EVENT_IDS))
def test_a_watcher_is_told_what_is_wrong(case: Case, attack: Attack) -> None:
    attack(case)


REFUSED = ("exit 1", "exit 2 request.invalid", "exit 3 request.invalid")
NO_TEXTS = {"half of a pair": f"a{HALF}", "a byte that is not UTF-8": "\udcff"}
NO_NUMBERS = {"many digits": DIGITS, "beyond 64 bits": str(2**63), "below zero": "-1", "NaN": "NaN"}
COMMANDS: Inputs = {
    **{f"{' '.join(arguments)}: {name}": ([*arguments, value], REFUSED)
       for arguments in (["show"], ["watch"], ["cancel"], ["cancel", "r1", "--reason"], ["runs", "--cursor"],
                         ["runs", "--tenant"], ["run", "clerk"], ["run", "clerk", "x", "--queue"])
       for name, value in NO_TEXTS.items()},
    **{f"{' '.join(arguments)}: {name}": ([*arguments, value], REFUSED)
       for arguments in (["runs", "--limit"], ["watch", "r1", "--after"])
       for name, value in NO_NUMBERS.items()},
    **{f"a budget: {name}": (["run", "clerk", "x", "--budget", f"max_cost_usd={value}"], REFUSED)
       for name, value in {**NO_NUMBERS, "what overflows": "1e999"}.items() if name != "beyond 64 bits"},
}  # fmt: skip


@hostile(TEXT, cases("cli", COMMANDS))
def test_a_command_says_what_is_wrong(case: Case, attack: Attack) -> None:
    attack(case)


ADDRESSES: Inputs = {
    ascii(url)[:40]: (
        url,
        ("tool.validation", "tool.permanent", "tool.unavailable", "tool.error", "tool.not_found"),
    )
    for part in (HALF, "a\udfff", "\0", DIGITS, "\u202e", "\uff11", "%00", "\x7f")
    for url in (f"http://127.0.0.1/{part}", f"http://{part}/", f"http://127.0.0.1:{part}/")
}
PATHS: Inputs = {
    ascii(path)[:40]: (path, ("200", "400", "403", "404", "closed"))
    for part in (
        "\udfff",
        "%ed%a0%80",
        "%00",
        DIGITS,
        "NaN",
        "1e999",
        "-1",
        "\u202e",
        "[" * 5_000,
        "{" * 5_000,
    )
    for path in (f"/task/{part}", f"/tasks?limit={part}")
}


@hostile(TEXT, [*cases("url", ADDRESSES), *cases("page", PATHS)])
def test_an_address_is_text(case: Case, attack: Attack) -> None:
    attack(case)


# --- every reader ----------------------------------------------------------------------------------------


MOST = 60
"""So many runs of a page are read by each reader, of those that do more than show that the worker goes on."""


def everything_of(world: World, client: Client) -> Iterator[str]:
    """Read all stored data with each of its readers, and return the ids of the runs."""
    cursor = None
    while True:
        page = client.runs(limit=500, cursor=cursor)
        assert {problem.key.rpartition(":")[2] for problem in page.problems} <= world.altered
        attacked = [record for record in page if record.steps > 1 or record.state is not RunState.COMPLETED]
        for record in attacked[:: len(attacked) // MOST + 1]:
            handle = client.handle(record.run_id)
            assert handle.wait(PATIENCE_S).run_id == record.run_id
            list(handle.events())
            list(client.checkpoints(record.run_id))
            yield record.run_id
        if (cursor := page.next_cursor) is None:
            return


def test_whatever_was_stored_is_read_by_every_reader(world: World) -> None:
    """Runs, results, events, checkpoints, sessions: after all cases above, no reader raises an error."""
    client = world.installation.client

    assert len(list(everything_of(world, client))) > 10, "also the short edition attacks more runs"
    for summary in client.sessions(limit=1000):
        if summary.session_id not in world.altered:
            client.session(summary.session_id)
