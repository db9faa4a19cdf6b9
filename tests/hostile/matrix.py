"""The matrix: which kind of attack can come through which door. The only place that says why one cannot.

Every other pair has at least `FEWEST` inputs; `test_the_table.py` fails when it has not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = [
    "CODE", "COMPUTATION", "ELEMENT", "FEWEST", "IMPOSSIBLE", "KEY", "LIBRARY", "MOST", "SAMPLE", "SECRETS",
    "TEXT",
    "TYPE",
    "UNBOUND", "missing",
]  # fmt: skip

FEWEST = 20
SAMPLE = 6
"""Of each pair in a run of all tests, which has to be short; `make hostile` takes every input."""

MOST = 24
"""Of one door in one table: what is more is bulk, which is tried with the slow tests."""

COMPUTATION = "foreign computation"
KEY = "a name that is a key"
TYPE = "a key of another type"
TEXT = "text, numbers, depth"
UNBOUND = "no bound"
ELEMENT = "an element that stops a loop"
SECRETS = "secrets, control sequences"
LIBRARY = "errors by name"
CODE = "foreign code"
KINDS = (COMPUTATION, KEY, TYPE, TEXT, UNBOUND, ELEMENT, SECRETS, LIBRARY, CODE)

DOORS = (
    "request", "options", "message", "record", "agents_file", "reply", "stream", "tool_result", "event",
    "state", "url", "header", "cli", "page",
)  # fmt: skip
PART_OF = {
    "answer": "reply", "arguments": "reply", "tool_error": "tool_result", "artifact": "state",
    "last_event_id": "header",
}  # fmt: skip
"""Doors whose inputs count for another one."""

IMPOSSIBLE: Mapping[tuple[str, str], str] = {
    **{
        (TYPE, door): "whoever comes through it writes no Redis key; a stored record's keys are those"
        for door in DOORS
        if door != "record"
    },
    (KEY, "tool_result"): "a result has no name: it is stored under the id of its call",
    (KEY, "url"): "no key is made of an address that a tool fetches",
    (KEY, "header"): "no key is made of a header's value",
    (KEY, "page"): "Flower looks up what it holds in memory: no key is made of a path",
    (ELEMENT, "request"): "a request is one element: the loop over requests is the queue, a message's door",
    (ELEMENT, "agents_file"): "a file is refused as a whole, on purpose: its elements are errors by name",
    (ELEMENT, "tool_result"): "a call has one result: the loop over calls is the reply's",
    (ELEMENT, "url"): "a call fetches one address: the loop over calls is the reply's",
    (ELEMENT, "header"): "a reply with one bad header is one bad reply: those are errors by name",
    (ELEMENT, "page"): "a page shows what is stored: its elements are those of records",
    (CODE, "agents_file"): "it is the one place that may name code: whoever deploys writes it",
}


def missing(tried: Mapping[tuple[str, str], int]) -> Iterator[str]:
    """Each pair that can exist and has too few inputs; each that has some though there can be none."""
    inputs: dict[tuple[str, str], int] = {}
    for (kind, door), count in tried.items():
        pair = kind, PART_OF.get(door, door)
        inputs[pair] = inputs.get(pair, 0) + count
    for kind in KINDS:
        for door in DOORS:
            count = inputs.get((kind, door), 0)
            if (kind, door) in IMPOSSIBLE:
                if count:
                    yield f"{kind} at {door}: {count} inputs, and the matrix says that there can be none"
            elif count < FEWEST:
                yield f"{kind} at {door}: {count} inputs; {FEWEST} are the fewest"
