"""Model clients that are measured. `PYTHON _llm_clients.py CLIENT URL LOOP` is a process with one of them.

The process reads lines `FORMAT WAY CALLS TOGETHER` and answers each with a line: the CPU time of a call in
microseconds, and the text of its reply. It imports nothing of this folder, so it runs in any environment.
`LOOP` is `asyncio` or `uvloop`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

MODEL = "gpt-4o-mini"
HI = [{"role": "user", "content": "Tell me a story in two hundred words."}]
Ask = Callable[[], Awaitable[str]]
Clients = dict[tuple[str, str], Ask]
PATHS = {"chat": "chat/completions", "responses": "responses", "messages": "messages"}


def _body(form: str, **more: Any) -> dict[str, Any]:
    """The body of a request, for a client without one of its own."""
    limit = {"max_tokens": 1000} if form == "messages" else {}
    return {"model": MODEL, ("input" if form == "responses" else "messages"): HI, **limit, **more}


# --- bare httpx ------------------------------------------------------------------------------------------


def bare_httpx(url: str) -> Clients:
    """What somebody writes who needs only the text."""
    import httpx

    no_limits = httpx.Limits(max_connections=None)
    http = httpx.AsyncClient(limits=no_limits, timeout=60, headers={"authorization": "Bearer key"})

    def whole(form: str) -> Ask:
        async def ask() -> str:
            reply = await http.post(f"{url}/{PATHS[form]}", json=_body(form))
            reply.raise_for_status()
            return text_of[form](reply.json())

        return ask

    def streamed(form: str) -> Ask:
        async def ask() -> str:
            pieces = []
            async with http.stream("POST", f"{url}/{PATHS[form]}", json=_body(form, stream=True)) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        pieces.append(piece_of[form](json.loads(line[6:])))
            return "".join(pieces)

        return ask

    text_of: dict[str, Callable[[Any], str]] = {
        "chat": lambda body: body["choices"][0]["message"]["content"],
        "responses": lambda body: body["output"][0]["content"][0]["text"],
        "messages": lambda body: body["content"][0]["text"],
    }
    piece_of: dict[str, Callable[[Any], str]] = {
        "chat": _chat_piece,
        "responses": lambda event: event["delta"] if event["type"] == "response.output_text.delta" else "",
        "messages": lambda event: (
            event["delta"].get("text", "") if event["type"] == "content_block_delta" else ""
        ),
    }
    return {
        (form, way): make(form) for form in PATHS for way, make in (("whole", whole), ("streamed", streamed))
    }


def _chat_piece(chunk: Any) -> str:
    choices = chunk["choices"]
    return (choices[0]["delta"].get("content") or "") if choices else ""


# --- this library ----------------------------------------------------------------------------------------


def ours(url: str) -> Clients:
    """The model client of this library."""
    from openagents_worker.agents import LLMOptions
    from openagents_worker.llm.base import ModelRequest
    from openagents_worker.llm.providers import make_client

    env = {"OPENAI_API_KEY": "key", "ANTHROPIC_API_KEY": "key"}

    def asks(provider: str) -> tuple[Ask, Ask]:
        options = LLMOptions(provider=provider, model=MODEL, api_base=url, max_tokens=1000)
        client: Any = make_client(options, env=env)

        async def whole() -> str:
            return str((await client.respond(ModelRequest(HI))).output_text)

        async def streamed() -> str:
            pieces: list[str] = []

            async def keep(piece: str) -> None:
                pieces.append(piece)

            await client.respond(ModelRequest(HI, on_delta=keep))
            return "".join(pieces)

        return whole, streamed

    found: Clients = {}
    for form, provider in zip(PATHS, ("openai_compatible", "openai_responses", "anthropic"), strict=True):
        found[form, "whole"], found[form, "streamed"] = asks(provider)
    return found


# --- the packages of the providers -----------------------------------------------------------------------


def openai(url: str) -> Clients:
    """The package `openai`."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(api_key="key", base_url=url, max_retries=0)
    messages: Any = HI

    async def chat() -> str:
        reply = await client.chat.completions.create(model=MODEL, messages=messages)
        return reply.choices[0].message.content or ""

    async def chat_streamed() -> str:
        pieces = []
        async for chunk in await client.chat.completions.create(model=MODEL, messages=messages, stream=True):
            if chunk.choices:
                pieces.append(chunk.choices[0].delta.content or "")
        return "".join(pieces)

    async def responses() -> str:
        return (await client.responses.create(model=MODEL, input=messages)).output_text

    async def responses_streamed() -> str:
        pieces = []
        async for event in await client.responses.create(model=MODEL, input=messages, stream=True):
            if event.type == "response.output_text.delta":
                pieces.append(event.delta)
        return "".join(pieces)

    return {
        ("chat", "whole"): chat,
        ("chat", "streamed"): chat_streamed,
        ("responses", "whole"): responses,
        ("responses", "streamed"): responses_streamed,
    }


def anthropic(url: str) -> Clients:
    """The package `anthropic`."""
    from anthropic import AsyncAnthropic

    client = AsyncAnthropic(api_key="key", base_url=url.removesuffix("/v1"), max_retries=0)
    asked: Any = {"model": MODEL, "max_tokens": 1000, "messages": HI}

    async def whole() -> str:
        return str((await client.messages.create(**asked)).content[0].text)

    async def streamed() -> str:
        pieces = []
        async for event in await client.messages.create(**asked, stream=True):
            if event.type == "content_block_delta":
                pieces.append(event.delta.text)
        return "".join(pieces)

    return {("messages", "whole"): whole, ("messages", "streamed"): streamed}


CLIENTS = {"httpx": bare_httpx, "ours": ours, "openai": openai, "anthropic": anthropic}


async def _main(name: str, url: str) -> None:
    clients = CLIENTS[name](url)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        form, way, calls, together = line.split()
        ask = clients[form, way]
        began, text = time.process_time(), ""
        for _ in range(int(calls)):
            text, *_ = await asyncio.gather(*(ask() for _ in range(int(together))))
        took = (time.process_time() - began) / (int(calls) * int(together))
        print(json.dumps([took * 1e6, text]), flush=True)


if __name__ == "__main__":
    if sys.argv[3] == "uvloop":
        import uvloop

        uvloop.run(_main(sys.argv[1], sys.argv[2]))
    else:
        asyncio.run(_main(sys.argv[1], sys.argv[2]))
