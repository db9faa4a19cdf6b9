"""A program that asks our model server by way of LiteLLM, and prints what came of it as JSON.

It runs where our wheel and the extra `litellm` are installed. A connection to anywhere but this machine, or a
task that is left behind, is in what it prints.
"""

from __future__ import annotations

__all__ = ["PROGRAM"]

PROGRAM = '''
import asyncio, json, socket, sys

outside = []
find = socket.getaddrinfo

def found(host, *more, **named):
    if host not in ("127.0.0.1", "localhost"):
        outside.append(str(host))
    return find(host, *more, **named)

socket.getaddrinfo = found

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMError
from openagents_worker.llm.providers import make_client
from openagents_worker.testing.model_server import ModelServer

KEY = "plain-key-0000000000"
HI = [{"role": "user", "content": "hi"}]
LONG = [{"role": "user", "content": "a long text"}]
ADD = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": ADD}}]
STATUSES = (400, 401, 404, 422, 429, 500)


def reply(request):
    text = json.dumps(request.messages)
    if "refuse" in text:
        status = int(text.split("refuse ")[1][:3])
        return {"error": "response", "status": status, "message": f"no {status} for {KEY}"}
    if "limit" in text:
        return {"error": "rate_limit", "retry_after_ms": 7000}
    if request.body.get("tools") and "tool_call_id" not in text and "tool_result" not in text:
        return {"tool_calls": [{"name": "add", "arguments": {"a": 17}}]}
    return {"text": "on and on " * 5000 if "long" in text else "hello there friend"}


async def converse(client, on_delta):
    asked = [{"role": "user", "content": "add"}]
    first = await client.generate(messages=asked, tools=TOOLS, on_delta=on_delta)
    call = first.tool_calls[0]
    calls = [{"id": call.id, "name": call.name, "arguments": dict(call.arguments)}]
    asked += [{"role": "assistant", "content": "", "tool_calls": calls}]
    asked += [{"role": "tool", "tool_call_id": call.id, "content": "18"}]
    last = await client.generate(messages=asked, tools=TOOLS, on_delta=on_delta)
    return [call.name, call.arguments["a"], first.finish_reason, last.output_text, last.finish_reason]


async def failure(client, text):
    try:
        await client.generate(messages=[{"role": "user", "content": text}])
    except LLMError as error:
        has_id = bool(error.request_id)
        return [error.code, error.retryable, error.status, error.retry_after_ms, has_id, str(error)]


async def cancelled(client, server):
    """Whether the server loses its client when a call is cancelled in the middle of its reply."""
    begun = asyncio.Event()

    async def on_delta(piece):
        begun.set()

    call = asyncio.create_task(client.generate(messages=LONG, on_delta=on_delta))
    await begun.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    while not any(event.get("status") == 499 for event in server.log):
        await asyncio.sleep(0.01)
    return call.cancelled()


async def main(model, loaded):
    shown = {"loaded_at_start": loaded}
    async with ModelServer(reply, token_delay_ms=5) as server:
        base = server.url if model.startswith("openai") else server.url.removesuffix("/v1")
        options = {"provider": "litellm", "model": model, "api_base": base, "api_key_env": "K"}
        client = make_client(LLMOptions(**options, retry={"max_attempts": 1}), env={"K": KEY})
        pieces = []

        async def on_delta(piece):
            pieces.append(piece)

        whole = await client.generate(messages=HI)
        streamed = await client.generate(messages=HI, on_delta=on_delta)
        shown["texts"] = [whole.output_text, streamed.output_text, "".join(pieces)]
        shown["pieces"] = len(pieces)
        shown["tokens"] = [[r.usage.input_tokens, r.usage.output_tokens] for r in (whole, streamed)]
        shown["costs"] = [r.usage.metadata.get("cost_usd") for r in (whole, streamed)]
        shown["tools"] = [await converse(client, each) for each in (None, on_delta)]
        shown["failures"] = {status: await failure(client, f"refuse {status}") for status in STATUSES}
        shown["limited"] = await failure(client, "limit")
        shown["cancelled"] = await cancelled(client, server)
        await client.aclose()
        shown["keys"] = all("plain-key" not in json.dumps(event) for event in server.log)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    return {**shown, "left": [task.get_name() for task in left], "outside": outside}


print(json.dumps(asyncio.run(main(sys.argv[1], "litellm" in sys.modules))))
'''
