"""Plugins written for the contracts of the original SDK, by name alone: its package is not installed."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any, ClassVar

from openagents_worker.errors import ModelRetryError

CALLED: list[str] = []
BLOCKED: list[asyncio.Event] = []


class Duck:
    """A pattern with every method of the original's contract, and no base class.

    It asks for a word, looks it up, looks up a batch, and asks for the answer.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}
        self.context: Any = None

    async def setup(
        self,
        agent_id: str,
        session_id: str,
        input_text: str,
        state: dict[str, Any],
        tools: dict[str, Any],
        llm_client: Any,
        llm_options: Any,
        event_bus: Any,
        run_request: Any = None,
    ) -> None:
        self.context = SimpleNamespace(
            agent_id=agent_id,
            session_id=session_id,
            run_id=run_request.run_id,
            input_text=input_text.upper(),
            state=state,
            tools=tools,
            llm_client=llm_client,
            event_bus=event_bus,
            system_prompt_fragments=["Be kind."],
            scratch={"from": "setup"},
            greeting="hello",
        )

    async def execute(self) -> Any:
        if (known := await self.resolve_followup(context=self.context)) is not None:
            return known
        await self.compress_context()
        word = await self.call_llm(
            messages=[{"role": "system", "content": self.compose_system_prompt("Go.")}]
        )
        found = await self.call_tool("look", {"word": word})
        batch = await self.call_tool_batch([("look", {"word": "a"}), ("look", {"word": "b"})])
        self.add_artifact(name="found", payload=batch)
        self.context.state["last"] = found
        answer = await self.call_llm(messages=[{"role": "user", "content": json.dumps([found, batch])}])
        answer = answer or await self.repair_empty_response(context=self.context, messages=[])
        return {"greeting": self.context.greeting, "from": self.context.scratch["from"], "answer": answer}

    async def react(self) -> dict[str, Any]:
        return {"type": "final", "content": ""}

    async def finalize(self, raw: Any, output_type: Any) -> Any:
        return raw if output_type is None else output_type.model_validate(raw)

    async def call_llm(self, *, messages: list[dict[str, Any]]) -> str:
        await self.emit("llm.called", model=None)
        text = await self.context.llm_client.complete(messages=messages)
        await self.emit("llm.succeeded", model=None, _metrics=SimpleNamespace(latency_ms=1))
        return str(text)

    async def call_tool(self, tool_id: str, params: dict[str, Any]) -> Any:
        await self.emit("tool.called", tool_id=tool_id, params=params)
        return await self.context.tools[tool_id].invoke(params, self.context)

    async def call_tool_batch(self, requests: list[tuple[str, dict[str, Any]]]) -> list[Any]:
        items = [SimpleNamespace(params=params, item_id=str(n)) for n, (_, params) in enumerate(requests)]
        results = await self.context.tools[requests[0][0]].invoke_batch(items, self.context)
        return [each.data if each.success else each.exception.code for each in results]

    async def emit(self, event_name: str, **payload: Any) -> None:
        ids = {"agent_id": self.context.agent_id, "session_id": self.context.session_id}
        await self.context.event_bus.emit(event_name, **ids, run_id=self.context.run_id, **payload)

    def add_artifact(self, *, name: str, payload: Any, kind: str = "generic") -> None:
        self.context.artifacts.append({"name": name, "kind": kind, "payload": payload})

    def compose_system_prompt(self, base: str) -> str:
        return "\n\n".join([base, self.context.input_text, *self.context.system_prompt_fragments])

    async def compress_context(self) -> None:
        await self.emit("shop.compressed", size=len(self.context.transcript), at=SimpleNamespace(x=1))

    async def resolve_followup(self, *, context: Any) -> Any:
        return "known" if context.input_text == "KNOWN" else None

    async def repair_empty_response(self, *, context: Any, messages: list[dict[str, Any]]) -> str:
        return "repaired"


class Bare:
    """Only `execute` and `finalize`: a refused answer must be a word that is longer than two letters."""

    seen: ClassVar[list[Any]] = []

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.context: Any = None

    async def execute(self) -> Any:
        return (
            await self.context.llm_client.generate(messages=[{"role": "user", "content": "?"}])
        ).output_text

    async def finalize(self, raw: Any, output_type: Any) -> Any:
        Bare.seen.append((raw, None if output_type is None else output_type.model_json_schema()))
        if raw == "no":
            raise ModelRetryError("longer, please")
        return raw if output_type is None else output_type.model_validate(raw)


class Greedy(Bare):
    """Catches every error of a tool and goes on."""

    async def finalize(self, raw: Any, output_type: Any) -> Any:
        return raw

    async def execute(self) -> Any:
        for word in ("a", "b", "c"):
            try:
                await self.context.tools["look"].invoke({"word": word}, self.context)
            except Exception as error:
                await self.context.event_bus.emit("shop.failed", error=str(error))
            await super().execute()
        return "done"


class Look:
    """A tool with a fallback. `bad` fails, `wait` waits for the test, `worse` fails without a fallback."""

    name = "look"

    def __init__(self, config: dict[str, Any] | None = None) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {"name": "Look", "description": "Looks a word up.", "parameters": {"type": "object"}}

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        word = params["word"]
        CALLED.append(word)
        if word == "wait" and CALLED.count("wait") == 1:
            await BLOCKED[0].wait()
        if word in ("bad", "worse"):
            raise LookupError(f"no {word}")
        return f"about {word}"

    async def fallback(self, error: Exception, params: dict[str, Any], context: Any) -> Any:
        if params["word"] == "worse":
            raise error
        return f"instead of {type(error).__name__}"


class Subscriber(Bare):
    """Subscribes to the events of its run."""

    async def execute(self) -> Any:
        self.context.event_bus.subscribe("*", print)


class Asker(Bare):
    """Asks by a method of this library's context."""

    async def finalize(self, raw: Any, output_type: Any) -> Any:
        return raw

    async def execute(self) -> Any:
        return [(await self.context.call_llm("?")).output_text for _ in range(3)]


class Consult:
    """A tool that asks the model of the run."""

    name, description = "consult", "Asks the model."

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "description": self.description, "parameters": self.schema()}

    async def invoke(self, params: dict[str, Any], context: Any) -> str:
        return str(await context.llm_client.complete(messages=[{"role": "user", "content": "consult"}]))


class Consulting(Bare):
    """Lets a tool ask the model, waits, and asks it twice itself."""

    async def execute(self) -> Any:
        await self.context.tools["consult"].invoke({}, self.context)
        await self.context.tools["look"].invoke({"word": "wait"}, self.context)
        for text in ("one", "two"):
            await self.context.llm_client.complete(messages=[{"role": "user", "content": text}])
        return "not reached"
