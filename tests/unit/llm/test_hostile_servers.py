"""The OpenAI-compatible client with malicious servers: each attack becomes one error with a code."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMError, LLMRateLimitError
from openagents_worker.llm.openai_chat import OpenAICompatibleClient
from openagents_worker.retry_after import MAX_RETRY_AFTER_MS
from tests.support.hostile_server import FAULTY, LARGE, Answer, serving

LIMIT = 256 * 1024  # what a reply may have here, so that these tests take little time
HI = [{"role": "user", "content": "hi"}]


def _client(url: str, **options: Any) -> OpenAICompatibleClient:
    wanted = {
        "model": "m",
        "api_base": url,
        "retry": {"max_attempts": 1},
        "max_reply_bytes": LIMIT,
        **options,
    }
    return OpenAICompatibleClient(LLMOptions(provider="openai_compatible", **wanted), api_key="sk-key")


async def _heard(piece: str) -> None: ...


async def _error(answer: Answer, *, streamed: bool) -> LLMError:
    async with serving(lambda _: answer) as url:
        client = _client(url)
        try:
            with pytest.raises(LLMError) as caught:
                await client.generate(messages=list(HI), on_delta=_heard if streamed else None)
        finally:
            await client.aclose()
    return caught.value


@pytest.fixture
def memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.share(of=3)
@pytest.mark.parametrize("name", LARGE)
async def test_a_reply_without_end_is_read_to_its_limit(name: str, memory: None) -> None:
    """Complete or streamed: an error with a code, and memory use of a few times the limit at most."""
    answer = LARGE[name]

    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    error = await _error(answer, streamed="stream" in name or "without end" in name)
    _, peak = tracemalloc.get_traced_memory()

    assert error.code in answer.codes
    assert not error.retryable or error.code == "llm.connection"
    assert peak - before < 30 * LIMIT
    assert len(str(error)) < 1000


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", FAULTY)
async def test_a_reply_that_cannot_be_read_is_a_coded_error(name: str, streamed: bool) -> None:
    """Exceptions of httpx, h11, zlib, json and codecs are always converted."""
    error = await _error(FAULTY[name], streamed=streamed)

    assert error.code in {*FAULTY[name].codes, *(("llm.connection", "llm.response") if streamed else ())}
    assert len(str(error)) < 1000
    if isinstance(error, LLMRateLimitError):
        assert error.retry_after_ms is None or 0 <= error.retry_after_ms <= MAX_RETRY_AFTER_MS


async def test_no_cookie_passes_from_one_call_to_the_next() -> None:
    """One client serves many runs, so cookies must not pass from one to another."""
    heads: list[bytes] = []
    body = b'{"choices": [{"message": {"content": "hi"}}]}'

    async def pieces() -> Any:
        head = f"HTTP/1.1 200 OK\r\nset-cookie: a=secret; path=/\r\ncontent-length: {len(body)}\r\n\r\n"
        yield head.encode() + body

    def answer(head: bytes) -> Answer:
        heads.append(head)
        return Answer(pieces, ())

    async with serving(answer) as url:
        client = _client(url)
        for _ in range(2):
            await client.generate(messages=list(HI))
        await client.aclose()

    assert len(heads) == 2
    assert not any(b"cookie" in head.lower() for head in heads)


async def test_a_redirect_is_not_followed_and_takes_no_key_along() -> None:
    """A server cannot redirect a request, with its key, to another server."""
    reached: list[bytes] = []

    async def elsewhere() -> Any:
        yield b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"

    def other(head: bytes) -> Answer:
        reached.append(head)
        return Answer(elsewhere, ())

    async with serving(other) as target:

        async def redirect() -> Any:
            yield f"HTTP/1.1 307 Again\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n".encode()

        error = await _error(Answer(redirect, ()), streamed=False)

    assert (error.code, reached) == ("llm.response", [])
