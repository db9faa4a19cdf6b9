"""What texts from outside cost: `python -m bench texts` prints a line a function, in milliseconds.

Each function runs on the event loop and is given texts that are made to take long, of one length and of twice
that. Work that follows the length takes twice as long for the second; work that follows its square takes four
times as long, and one text of a megabyte then blocks a worker. The worst text of each function is shown. What
takes less than a few milliseconds is not judged: the machine's own noise is larger.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from openagents_worker.agents.variables import VARIABLE
from openagents_worker.errors import OpenAgentsError
from openagents_worker.json_schema.rules import SchemaProblem, read_schema
from openagents_worker.llm.script import words
from openagents_worker.llm.sse import SSEDecoder
from openagents_worker.redaction import redact, safe_message, safe_text, safe_url
from openagents_worker.runtime.output import OutputMismatch, _parse_json_answer
from openagents_worker.suggest import nearest
from openagents_worker.tools.builtin import clock
from openagents_worker.tools.builtin.compute import evaluate

CHARS = 20_000
TRIES = 3
MOST_RATIO = 3.0
JUDGED_FROM_MS = 20.0

PIECES = (
    "a", " ", "1", "\n", '"', "'", "`", "```", "```\n", "aaaa:", "://", "://a:", "sk-", "Bearer ", "password",
    "password=", "secret='a ", 'token:"', "api_key", "?a", "?password&", "${A:-", "${A",
    "\x1b]52;", "2024-", "Mon, ", "data: ", "data:\n", "{", "[", "(", "-", "1+", "\\",
)  # fmt: skip


FUNCTIONS: Mapping[str, Callable[[str], object]] = {
    "a date that a tool reads": lambda text: clock._parsed(text, "date_parse"),
    "a field's name that is near": lambda text: nearest(text, ["a" * 60] * 300),
    "a formula that a tool computes": evaluate,
    "a reply in pieces": words,
    "a schema's names": lambda text: read_schema({"properties": {text: {"$ref": f"#/{text}"}}}),
    "a stream's lines": lambda text: list(SSEDecoder().feed(text.encode())),
    "an answer as JSON": _parse_json_answer,
    "an event's payload": lambda text: redact({"text": text}),
    "an exception's text": safe_message,
    "a text": safe_text,
    "a URL": safe_url,
    "variables of the agents file": VARIABLE.findall,
}


def took_ms(function: Callable[[str], object], text: str) -> float:
    """The fastest of some tries."""
    took = []
    for _ in range(TRIES):
        began = time.perf_counter()
        with suppress(OpenAgentsError, SchemaProblem, ValueError, OutputMismatch):
            function(text)
        took.append((time.perf_counter() - began) * 1000)
    return min(took)


def worst(function: Callable[[str], object]) -> tuple[str, float, float]:
    """The piece of which a text takes the longest, and how long two lengths of it take."""
    short = {piece: took_ms(function, _of(piece, CHARS)) for piece in PIECES}
    piece = max(short, key=lambda each: short[each])
    return piece, short[piece], took_ms(function, _of(piece, 2 * CHARS))


def main(arguments: Sequence[str] = ()) -> int:
    """Print the list; 0 when no function takes the square of its text's length."""
    del arguments
    print(f"{'':32}{'worst text':>14}{f'{CHARS:,} chars':>14}{f'{2 * CHARS:,} chars':>14}{'ratio':>8}")
    fine = True
    for name, function in FUNCTIONS.items():
        piece, short_ms, long_ms = worst(function)
        ratio = long_ms / short_ms
        print(f"{name:32}{piece!r:>14}{short_ms:>11.2f} ms{long_ms:>11.2f} ms{ratio:>8.1f}", flush=True)
        fine = fine and (long_ms < JUDGED_FROM_MS or ratio < MOST_RATIO)
    return 0 if fine else 1


def _of(piece: str, chars: int) -> str:
    return piece * (chars // len(piece))
