"""Plugins as users of the original SDK have them: they derive from the classes of its package.

Imported in the tests' process and by workers, both with the package on their path.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any, ClassVar

from openagents.decorators import tool  # type: ignore[import-not-found,unused-ignore]
from openagents.errors.exceptions import (  # type: ignore[import-not-found,unused-ignore]
    ModelRetryError,
    OpenAgentsError,
    PermanentToolError,
    RetryableToolError,
    ToolError,
    ToolRateLimitError,
)
from openagents.interfaces.followup import (  # type: ignore[import-not-found,unused-ignore]
    FollowupResolution,
)
from openagents.interfaces.pattern import PatternPlugin  # type: ignore[import-not-found,unused-ignore]
from openagents.interfaces.response_repair import (  # type: ignore[import-not-found,unused-ignore]
    ResponseRepairDecision,
)
from openagents.interfaces.tool import (  # type: ignore[import-not-found,unused-ignore]
    JobHandle,
    JobStatus,
    ToolExecutionResult,
    ToolPlugin,
    ToolResult,
)
from openagents.plugins.builtin.pattern.react import (  # type: ignore[import-not-found,unused-ignore]
    ReActPattern,
)

CALLED: list[Any] = []
CANCELLED: list[str] = []


class ShopBusy(ToolRateLimitError):  # type: ignore[misc,unused-ignore]
    """A class of the user's, with a code of its own."""

    code = "shop.busy"


class OftenBusy(ToolError):  # type: ignore[misc,unused-ignore]
    """A class of the user's that changes only whether it is retryable."""

    retryable = True


def busy() -> ShopBusy:
    """An error with an attribute that only its class knows."""
    error = ShopBusy("come back\nlater", "look", retry_after_ms=40, hint="at noon")
    error.shelf = "upper"
    return error


RAISED: dict[str, Any] = {
    "busy": busy,
    "often": lambda: OftenBusy("not now", "look"),
    "retry": lambda: RetryableToolError("again", "look"),
    "never": lambda: PermanentToolError("no such word", "look"),
    "other": lambda: ModelRetryError("another word, please"),
    "plain": lambda: LookupError("a bug"),
}


class Look(ToolPlugin):  # type: ignore[misc,unused-ignore]
    """Looks a word up. Some words raise, some return the package's result objects."""

    name, description = "Look", "Looks a word up."

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        word = params["word"]
        CALLED.append(word)
        if word in RAISED and CALLED.count(word) <= 5:
            raise RAISED[word]()
        match word:
            case "slow":
                try:
                    await asyncio.Event().wait()
                finally:
                    CANCELLED.append(word)
            case "success":
                return ToolResult(success=True, data={"found": 1})
            case "failure":
                return ToolResult(success=False, error="it was not found")
            case "executed":
                cause = ShopBusy("the inner cause", "look")
                return ToolExecutionResult(tool_id="look", success=False, exception=cause)
        return f"about {word}"


class LookOrGuess(Look):
    """Has a guess in place of an error."""

    async def fallback(self, error: Exception, params: dict[str, Any], context: Any) -> Any:
        return ToolResult(success=True, data=f"a guess, after {getattr(error, 'code', type(error).__name__)}")


@tool
async def greet(params: dict[str, Any], context: Any) -> dict[str, Any]:
    """Greets somebody."""
    return {"hello": params["name"], "run": context.run_id}


@tool(name="shout", description="Says it aloud.")
def loud(params: dict[str, Any], context: Any) -> str:
    return str(params["name"]).upper()


@tool
async def add(first: int, second: int) -> int:
    """Adds two numbers."""
    return first + second


class Polite(ReActPattern):  # type: ignore[misc,unused-ignore]
    """A subclass of the package's pattern: changes what `setup` gets, keeps a note, and cleans its output."""

    async def setup(self, **arguments: Any) -> None:
        await super().setup(**{**arguments, "input_text": f"Please: {arguments['input_text']}"})
        self.context.scratch["note"] = "kept"
        self.context.system_prompt_fragments.append("Be polite.")

    async def execute(self) -> Any:
        answer = await super().execute()
        self.add_artifact(name="note", payload=self.context.scratch["note"])
        return answer

    async def finalize(self, raw: Any, output_type: Any) -> Any:
        if raw == "rude":
            raise ModelRetryError("say it politely")
        return await super().finalize(raw.removeprefix("Sir: ") if isinstance(raw, str) else raw, output_type)


class Knows(ReActPattern):  # type: ignore[misc,unused-ignore]
    """Knows some answers, and repairs empty ones."""

    async def resolve_followup(self, *, context: Any) -> Any:
        is_known = context.input_text == "known"
        return FollowupResolution(status="resolved", output="I know") if is_known else None

    async def repair_empty_response(self, *, context: Any, messages: Any, **_: Any) -> Any:
        reply = await context.llm_client.generate(messages=[*messages, {"role": "user", "content": "Go on."}])
        return ResponseRepairDecision(status="repaired", output=reply.output_text)


class Batch(PatternPlugin):  # type: ignore[misc,unused-ignore]
    """Uses the methods of the package's base class: a batch, single calls, and the model."""

    async def execute(self) -> Any:
        words = self.context.input_text.split()
        results = await self.call_tool_batch([("look", {"word": word}) for word in words])
        shown = [each if isinstance(each, str) else each.code for each in results]
        return [shown, await self.call_llm(messages=[{"role": "user", "content": json.dumps(shown)}])]


class Catching(PatternPlugin):  # type: ignore[misc,unused-ignore]
    """Catches errors by the classes of the package."""

    seen: ClassVar[list[str]] = []

    async def execute(self) -> Any:
        try:
            await self.call_tool("look", {"word": self.context.input_text})
        except ModelRetryError as error:
            return ["model retry", error.code]
        except PermanentToolError as error:
            return ["permanent", error.code, str(error)]
        except ToolRateLimitError as error:
            known = [type(error).code, error.retry_after_ms, isinstance(error, ShopBusy)]
            return ["rate limit", *known, hasattr(error, "shelf")]
        except OpenAgentsError as error:
            return ["other", error.code]


class Raising(PatternPlugin):  # type: ignore[misc,unused-ignore]
    """Raises the error that its input names."""

    async def execute(self) -> Any:
        raise RAISED[self.context.input_text]()


class Once(ToolPlugin):  # type: ignore[misc,unused-ignore]
    """Logs its effect. Its first attempt hangs before the effect, until its process is killed."""

    name, description = "Once", "Does something that must be done once."

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        folder = Path(os.environ["ONCE_FOLDER"])
        begun = folder / f"begun-{context.idempotency_key.replace(':', '-')}"
        if not begun.exists():
            begun.touch()
            await asyncio.Event().wait()
        with (folder / "effects").open("a") as effects:
            effects.write(f"{context.run_id} {params['n']}\n")
        return f"did {params['n']}"


class Printer(ToolPlugin):  # type: ignore[misc,unused-ignore]
    """A tool with a job, written with the models of the package."""

    name = "look"
    description = "Prints a word."
    durable_idempotent = False

    async def invoke(self, params: dict[str, Any], context: Any) -> str:
        CALLED.append("invoke")
        return "not a job"

    async def invoke_background(self, params: dict[str, Any], context: Any) -> Any:
        CALLED.append("start")
        return JobHandle(job_id="7", tool_id="look", status="pending", created_at=1.0)

    async def poll_job(self, handle: Any, context: Any) -> Any:
        CALLED.append(("poll", handle.job_id, handle.created_at))
        is_over = CALLED.count(("poll", "7", 1.0)) > 1
        return JobStatus(job_id="7", status="succeeded" if is_over else "running", result={"printed": True})

    async def cancel_job(self, handle: Any, context: Any) -> bool:
        CALLED.append(("cancel", handle.job_id))
        return True


class Waits(PatternPlugin):  # type: ignore[misc,unused-ignore]
    """Starts a call in the background, asks for it until it has ended, and cancels a second one."""

    async def execute(self) -> Any:
        tool = self.context.tools["look"]
        handle = await tool.invoke_background({"word": "pandas"}, self.context)
        other = await tool.invoke_background({"word": "others"}, self.context)
        was_running = await tool.cancel_job(other, self.context)
        seen = []
        while True:
            status = await tool.poll_job(handle, self.context)
            seen.append(status.status)
            if status.status not in ("pending", "running"):
                assert isinstance(handle, JobHandle)
                assert isinstance(status, JobStatus)
                return [sorted(set(seen)), status.result, was_running]
            await asyncio.sleep(0.02)

    async def react(self) -> Any:
        raise NotImplementedError
