"""The cost of hostile texts: `python -m bench texts` prints one line per function, in milliseconds.

Each of these functions runs on the event loop. It gets texts that are designed to take long, of one length
and of twice that length. A function with linear cost takes twice as long for the second text. A function with
quadratic cost takes four times as long, and a text of a megabyte would block the worker. The table shows the
worst text of each function. Times of a few milliseconds are not judged, because the noise of the machine is
larger.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from openagents_worker.agents.variables import VARIABLE
from openagents_worker.errors import OpenAgentsError
from openagents_worker.json_schema.rules import SchemaProblem, read_schema
from openagents_worker.llm.openai_chat_stream import StreamedReply
from openagents_worker.llm.script import words
from openagents_worker.llm.sse import SSEDecoder
from openagents_worker.redaction import redact, safe_message, safe_text, safe_url
from openagents_worker.runtime.output import OutputMismatch, parse_json_answer
from openagents_worker.suggest import nearest
from openagents_worker.tools.builtin import clock
from openagents_worker.tools.builtin.compute import evaluate

CHARS = 20_000
STREAMED_CHARS = 4  # of a piece of a streamed reply
TRIES = 3
MAX_RATIO = 3.0
JUDGED_FROM_MS = 20.0

PIECES = (
    "a", " ", "1", "\n", '"', "'", "`", "```", "```\n", "aaaa:", "://", "://a:", "sk-", "Bearer ", "password",
    "password=", "secret='a ", 'token:"', "api_key", "?a", "?password&", "${A:-", "${A",
    "\x1b]52;", "2024-", "Mon, ", "data: ", "data:\n", "{", "[", "(", "-", "1+", "\\",
)  # fmt: skip


FUNCTIONS: Mapping[str, Callable[[str], object]] = {
    "a date that a tool reads": lambda text: clock._parse_time(text, "date_parse"),
    "a field's name that is near": lambda text: nearest(text, ["a" * 60] * 300),
    "a formula that a tool computes": evaluate,
    "a reply in pieces": words,
    "a schema's names": lambda text: read_schema({"properties": {text: {"$ref": f"#/{text}"}}}),
    "a stream's lines": lambda text: list(SSEDecoder().feed(text.encode())),
    "a stream's tool arguments": lambda text: _streamed(
        text, lambda piece: {"tool_calls": [{"function": {"name": "add", "arguments": piece}}]}
    ),
    "a stream's reasoning": lambda text: _streamed(
        text, lambda piece: {"reasoning_details": [{"type": "text", "index": 0, "text": piece}]}
    ),
    "an answer as JSON": parse_json_answer,
    "an event's payload": lambda text: redact({"text": text}),
    "an exception's text": safe_message,
    "a text": safe_text,
    "a URL": safe_url,
    "variables of the agents file": VARIABLE.findall,
}


def _streamed(text: str, delta: Callable[[str], Mapping[str, Any]]) -> None:
    """Read a streamed reply that has the text in pieces of a few characters."""
    reply = StreamedReply()
    for at in range(0, len(text), STREAMED_CHARS):
        reply.add({"choices": [{"delta": delta(text[at : at + STREAMED_CHARS])}]})
    reply.body()


def took_ms(function: Callable[[str], object], text: str) -> float:
    """The time of the fastest of several tries."""
    took = []
    for _ in range(TRIES):
        began = time.perf_counter()
        with suppress(OpenAgentsError, SchemaProblem, ValueError, OutputMismatch):
            function(text)
        took.append((time.perf_counter() - began) * 1000)
    return min(took)


def worst(function: Callable[[str], object]) -> tuple[str, float, float]:
    """The piece whose repetition takes longest, and the times in milliseconds for two lengths."""
    short = {piece: took_ms(function, _of(piece, CHARS)) for piece in PIECES}
    piece = max(short, key=lambda each: short[each])
    return piece, short[piece], took_ms(function, _of(piece, 2 * CHARS))


def main(arguments: Sequence[str] = ()) -> int:
    """Print the list. Return 0 if no function has a quadratic cost."""
    del arguments
    print(f"{'':32}{'worst text':>14}{f'{CHARS:,} chars':>14}{f'{2 * CHARS:,} chars':>14}{'ratio':>8}")
    fine = True
    for name, function in FUNCTIONS.items():
        piece, short_ms, long_ms = worst(function)
        ratio = long_ms / short_ms
        print(f"{name:32}{piece!r:>14}{short_ms:>11.2f} ms{long_ms:>11.2f} ms{ratio:>8.1f}", flush=True)
        fine = fine and (long_ms < JUDGED_FROM_MS or ratio < MAX_RATIO)
    return 0 if fine else 1


def _of(piece: str, chars: int) -> str:
    return piece * (chars // len(piece))
