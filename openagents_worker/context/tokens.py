"""Token counters: the only place that loads tokenizers and estimates token counts.

Tokenizers are loaded when a worker starts, because a missing table is downloaded then. During a run nothing
is loaded: `token_counter` returns a counter that is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Protocol

from openagents_worker.errors import PluginConfigError, text_of
from openagents_worker.jsontext import dumps
from openagents_worker.models.media import MEDIA_TOKENS, without_media
from openagents_worker.telemetry.logs import get_logger

__all__ = ["ESTIMATE", "BytesEstimate", "TextTokens", "TokenCounter", "token_counter", "tokens_of"]

log = get_logger(__name__)

PIECE_CHARS = 4_000  # a tokenizer takes quadratic time for some texts without spaces
LOADING_S = 30.0
BYTES_PER_TOKEN = 4
CALL_FIELDS = ("tool_calls", "tool_call_id", "name")


class TokenCounter(Protocol):
    """Counts the tokens of texts. `name` says how: the name of the encoding, or of the estimate."""

    name: str

    def count(self, text: str, most: int | None = None) -> int:
        """The number of tokens, at least 1. May stop counting as soon as the number exceeds `most`."""
        ...


class BytesEstimate:
    """One token for four bytes of UTF-8: close to real counts for English, too low for source code."""

    name = "estimate: bytes/4"

    def count(self, text: str, most: int | None = None) -> int:
        return max(1, len(text.encode(errors="surrogatepass")) // BYTES_PER_TOKEN)


ESTIMATE = BytesEstimate()


class TextTokens:
    """Counts with the `encode` of a tokenizer, piece by piece, so that a long text does not block.

    A word that two pieces share may count as two tokens.
    """

    def __init__(self, name: str, encode: Callable[[str], Iterable[int]]) -> None:
        self.name = name
        self._encode = encode

    def count(self, text: str, most: int | None = None) -> int:
        tokens = 0
        for at in range(0, len(text), PIECE_CHARS):
            tokens += sum(1 for _ in self._encode(text[at : at + PIECE_CHARS]))
            if most is not None and tokens > most:
                break
        return max(1, tokens)


def tokens_of(entries: Iterable[Mapping[str, Any]], counter: TokenCounter, most: int) -> int:
    """The tokens of what a model gets of these entries: content and tool calls, also those inside a turn.

    An image or a file counts with `MEDIA_TOKENS`. A number above `most` is only known to be above it.
    """
    tokens = 0
    for entry in entries:
        for message in (*entry.get("tool_messages", ()), entry):
            content, media = without_media(message.get("content"))
            tokens += media * MEDIA_TOKENS
            for text in _texts(content, message):
                if tokens > most:
                    return tokens
                tokens += counter.count(text, most)
    return tokens


def _texts(content: Any, message: Mapping[str, Any]) -> Iterator[str]:
    if content:
        yield content if isinstance(content, str) else dumps(content)
    if calls := {name: message[name] for name in CALL_FIELDS if message.get(name)}:
        yield dumps(calls)


def token_counter(model: str | None, encoding: str | None) -> TokenCounter:
    """The counter for a model: its tokenizer, if `tiktoken` is installed and knows the model, else an
    estimate. `encoding` names an encoding of tiktoken.

    Raises `PluginConfigError` if this encoding cannot be loaded.
    """
    if encoding is None and model is None:
        return ESTIMATE
    try:
        return _loaded(model if encoding is None else "", encoding)
    except Exception as error:
        if encoding is not None:
            raise PluginConfigError(
                f"the encoding {encoding!r} cannot be loaded: {type(error).__name__}: {text_of(error)}",
                hint="install openagents-worker[tokenizers]; a worker downloads its tables at its start, "
                "unless they are in TIKTOKEN_CACHE_DIR",
            ) from error
        if not isinstance(error, ImportError | LookupError):  # not installed, or it does not know the model
            log.warning("context.tokenizer_not_loaded", model=model, error=text_of(error), used=ESTIMATE.name)
        return ESTIMATE


@lru_cache(maxsize=64)
def _loaded(model: str, encoding: str | None) -> TokenCounter:
    """Load a tokenizer, in a thread with a time limit: tiktoken downloads without one.

    Raises KeyError if tiktoken does not know the model.
    """
    import tiktoken  # type: ignore[import-not-found,unused-ignore]  # an extra

    found: list[Any] = []

    def load() -> None:
        try:
            name = encoding or tiktoken.encoding_name_for_model(model)
            found.append(tiktoken.get_encoding(name))
        except BaseException as error:  # noqa: BLE001 - it is raised below
            found.append(error)

    thread = threading.Thread(target=load, name="load a tokenizer", daemon=True)
    thread.start()
    thread.join(LOADING_S)
    if not found:
        raise TimeoutError(f"its table was not loaded within {LOADING_S:.0f} s")
    if isinstance(found[0], BaseException):
        raise found[0]
    table = found[0]
    return TextTokens(table.name, lambda text: table.encode(text, disallowed_special=()))
