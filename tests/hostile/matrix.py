"""The matrix of attacks and entry points: the only place that says why a combination is impossible.

Every other combination has at least `FEWEST` inputs; otherwise `test_the_table.py` fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = [
    "CODE", "COMPUTATION", "ELEMENT", "FEWEST", "IMPOSSIBLE", "KEY", "LIBRARY", "SAMPLE", "SECRETS", "TEXT",
    "TYPE", "UNBOUND", "missing",
]  # fmt: skip

FEWEST = 20
SAMPLE = 2
"""Of each pair in `make test`, which has to be short; `make test-long` takes the others."""

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

ENTRY_POINTS = (
    "request", "options", "message", "record", "agents_file", "reply", "stream", "tool_result", "event",
    "state", "url", "header", "cli", "page",
)  # fmt: skip
PART_OF = {
    "answer": "reply", "arguments": "reply", "tool_error": "tool_result", "artifact": "state",
    "mcp": "tool_result", "last_event_id": "header", "anthropic_reply": "reply", "responses_reply": "reply",
}  # fmt: skip
"""Entry points whose inputs count for another one."""

IMPOSSIBLE: Mapping[tuple[str, str], str] = {
    **{
        (TYPE, entry_point): "this input writes no Redis key; a stored record's keys are those"
        for entry_point in ENTRY_POINTS
        if entry_point != "record"
    },
    (KEY, "tool_result"): "a result has no name; it is stored under the id of its call",
    (KEY, "url"): "no key is made from a URL that a tool fetches",
    (KEY, "header"): "no key is made from a header's value",
    (KEY, "page"): "Flower reads its own memory; no key is made from a path",
    (
        ELEMENT,
        "request",
    ): "a request is one element; the list of requests is the queue (see message)",
    (ELEMENT, "agents_file"): "an invalid file is rejected as a whole, on purpose; see errors by name",
    (ELEMENT, "tool_result"): "a call has one result; the list of calls is in the reply",
    (ELEMENT, "url"): "a call fetches one URL; the list of calls is in the reply",
    (ELEMENT, "header"): "a reply with one invalid header is one invalid reply; see errors by name",
    (ELEMENT, "page"): "a page shows stored data; its elements are those of records",
    (CODE, "agents_file"): "it may name code: the operator writes it",
}


def missing(tried: Mapping[tuple[str, str], int]) -> Iterator[str]:
    """The possible combinations with too few inputs, and the impossible ones that have inputs."""
    inputs: dict[tuple[str, str], int] = {}
    for (kind, entry_point), count in tried.items():
        pair = kind, PART_OF.get(entry_point, entry_point)
        inputs[pair] = inputs.get(pair, 0) + count
    for kind in KINDS:
        for entry_point in ENTRY_POINTS:
            count = inputs.get((kind, entry_point), 0)
            if (kind, entry_point) in IMPOSSIBLE:
                if count:
                    yield f"{kind} at {entry_point}: {count} inputs, but the matrix calls this impossible"
            elif count < FEWEST:
                yield f"{kind} at {entry_point}: {count} inputs; at least {FEWEST} are required"
