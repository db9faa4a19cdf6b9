"""Custom patterns and tools, loaded through `impl`. Tests assert on the logs that they keep."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from contextlib import suppress
from typing import Any, ClassVar

from openagents_worker import tool
from openagents_worker.errors import PermanentToolError, ToolRateLimitError
from openagents_worker.runtime.latch import LatchReason, RunLatched
from openagents_worker.tools.base import ToolExecutionSpec, ToolPlugin
from tests.support.waiting import await_for

LOG: list[tuple[Any, ...]] = []
"""What the tools did, as they saw it."""

GATES: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
"""A call that waits for a gate is in flight for as long as a test wants."""

FAILURES: dict[str, list[Exception]] = {}


def reset() -> None:
    LOG.clear()
    GATES.clear()
    FAILURES.clear()
    ANSWERS.clear()


def executed(name: str) -> list[Any]:
    """The arguments of the calls of a tool that ended, in the order in which they ended."""
    return [entry[2] for entry in LOG if entry[:2] == ("end", name)]


class Uncertain(ToolPlugin):
    """A tool with effects. Its errors say whether the call was executed, as its config says."""

    name, description = "uncertain", "Does something."
    durable_idempotent = False

    class Config(ToolPlugin.Config):
        was_executed: bool | None = None
        gate: str | None = None

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        LOG.append(("call", "uncertain", context.idempotency_key))
        if len([entry for entry in LOG if entry[:2] == ("call", "uncertain")]) > 1:
            if self.cfg.gate is not None:
                await GATES[self.cfg.gate].wait()
            return "done"
        error = ToolRateLimitError("no answer", "uncertain", retry_after_ms=1)
        error.was_executed = self.cfg.was_executed
        raise error


class Charge:
    """A tool with the interface of the original SDK.

    Waits for the gate in its arguments, and fails if they say so.
    """

    description = "Charges somebody."
    concurrency_safe = False

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    def describe(self) -> dict[str, Any]:
        return {"name": "charge", "description": self.description, "parameters": {"type": "object"}}

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(concurrency_safe=bool(self.config.get("safe")))

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        who = params.get("who")
        LOG.append(("begin", "charge", who, context.idempotency_key))
        if gate := params.get("gate"):
            await GATES[gate].wait()
        if FAILURES.get(str(who)):
            raise FAILURES[str(who)].pop(0)
        context.state.setdefault("charged", []).append(who)
        context.state["last"] = who
        LOG.append(("end", "charge", who))
        return {"charged": who}


class OnceOnly(Charge):
    durable_idempotent = False


class Look(Charge):
    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        if gate := params.get("gate"):
            await GATES[gate].wait()
        LOG.append(("end", "look", params.get("who")))
        return {"seen": params.get("who")}


class _Pattern:
    context: Any

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}


class Branches(_Pattern):
    """Two branches in parallel, each calls look, then charge.

    Which one is faster differs between attempts.
    """

    async def execute(self) -> Any:
        async def branch(who: str) -> Any:
            await self.context.tools["look"].invoke({"who": who, "gate": f"look-{who}"})
            return await self.context.tools["charge"].invoke({"who": who, "gate": f"charge-{who}"})

        return await asyncio.gather(branch("alice"), branch("bob"))


class PlanB(_Pattern):
    """Catches any error of its first tool and calls another."""

    async def execute(self) -> Any:
        try:
            return await self.context.tools["charge"].invoke({"who": "a"})
        except Exception as error:
            LOG.append(("caught", type(error).__name__, str(error)))
            return await self.context.tools["charge"].invoke({"who": "b"})


class Stubborn(_Pattern):
    """Catches everything, also the signals of the runtime."""

    async def execute(self) -> Any:
        results = await asyncio.gather(
            *(self.context.tools["charge"].invoke({"who": who, "gate": f"charge-{who}"}) for who in "ab"),
            return_exceptions=True,
        )
        return [str(result) for result in results]


class Impatient(_Pattern):
    """Gives a call a time limit that is over as soon as the call has begun, then does something else."""

    async def execute(self) -> Any:
        try:
            async with asyncio.timeout(None) as limit:
                watching = asyncio.create_task(self.end_when_begun(limit))
                await self.context.tools["charge"].invoke({"who": "slow", "gate": "never"})
        except TimeoutError:
            LOG.append(("timeout",))
        await watching
        return await self.context.tools["charge"].invoke({"who": "then", "gate": "then"})

    async def end_when_begun(self, limit: asyncio.Timeout) -> None:
        await await_for(lambda: any(entry[:3] == ("begin", "charge", "slow") for entry in LOG), "it begins")
        limit.reschedule(asyncio.get_running_loop().time())


class Steps(_Pattern):
    """Charges 0 … n-1 one after another, and counts in the session state itself."""

    async def execute(self) -> Any:
        for number in range(int(self.config.get("n", 3))):
            self.context.state["counter"] = self.context.state.get("counter", 0) + 1
            await self.context.emit("app.step", number=number)
            await self.context.tools["charge"].invoke({"who": number, "gate": f"charge-{number}"})
        return self.context.state["counter"]


class Silent(_Pattern):
    """Makes no calls."""

    async def execute(self) -> Any:
        return "done"


class CatchesAll(_Pattern):
    """Catches every exception and continues."""

    async def execute(self) -> Any:
        try:
            await self.context.tools["charge"].invoke({"who": "a", "gate": "never"})
        except BaseException as error:
            LOG.append(("caught", type(error).__name__))
        return "done all the same"


class LatchesItself(_Pattern):
    """Raises `RunLatched` itself."""

    async def execute(self) -> Any:
        raise RunLatched(LatchReason.FENCED)


class Chancy(_Pattern):
    """Makes a different call in each attempt: its randomness is not recorded."""

    count = 0

    async def execute(self) -> Any:
        Chancy.count += 1
        await self.context.tools["charge"].invoke({"who": "first"})
        await self.context.tools["charge"].invoke({"who": f"attempt {Chancy.count}", "gate": "second"})
        await self.context.tools["charge"].invoke({"who": "third", "gate": "third"})
        return "done"


def rate_limited(ms: int = 1) -> Exception:
    return ToolRateLimitError("slow down", "charge", retry_after_ms=ms)


def refused() -> Exception:
    return PermanentToolError("card refused", "charge")


class Diary:
    """An external memory that counts its calls."""

    asked: ClassVar[int] = 0
    kept: ClassVar[list[Any]] = []

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    async def inject(self, context: Any) -> None:
        Diary.asked += 1
        context.memory_view["diary"] = [f"page {Diary.asked}"]

    async def writeback(self, context: Any) -> None:
        if gate := self.config.get("gate"):
            await GATES[gate].wait()
        Diary.kept.append(context.state["_runtime_last_output"])
        context.state["pages"] = len(Diary.kept)


class BadAccount(PermanentToolError):
    code = "shop.bad_account"
    extra_fields = ("iban",)
    iban = "DE02"


class Discreet(_Pattern):
    """Uses a key that only the agents file declares secret."""

    async def execute(self) -> Any:
        await self.context.tools["charge"].invoke({"who": {"customerIBAN": "DE02"}})
        await self.context.emit("app.charged", iban="DE02")
        return {"iban": "DE02"}


class Shopper(_Pattern):
    """Calls a tool and returns a fixed output; fails if its config says so."""

    async def execute(self) -> Any:
        seen = await self.context.tools["depslook"].invoke({"gate": "deps"})
        if self.config.get("fails"):
            raise ValueError("a bug")
        return [self.context.deps["name"], seen]


class DepsLook(Charge):
    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        LOG.append(("look", context.deps["name"]))
        await GATES[params["gate"]].wait()
        return context.deps["name"]


class Endless(_Pattern):
    """Never ends."""

    async def execute(self) -> Any:
        LOG.append(("waiting",))
        await asyncio.Event().wait()


class Deaf(_Pattern):
    """Swallows its cancellation once."""

    async def execute(self) -> Any:
        LOG.append(("waiting",))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            LOG.append(("swallowed",))
        return await self.context.tools["charge"].invoke({"who": "after"})


class Broken(_Pattern):
    async def execute(self) -> Any:
        await self.context.tools["charge"].invoke({"who": "before"})
        raise ValueError("a bug")


class Huge(_Pattern):
    async def execute(self) -> Any:
        return await self.context.tools["charge"].invoke({"who": "x" * 2_000_000})


class Inward(Charge):
    """A tool that calls the model inside its own call."""

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        LOG.append(("begin", "inward", params.get("who")))
        reply = await context.llm_client.generate(messages=[{"role": "user", "content": "inside"}])
        if gate := params.get("gate"):
            await GATES[gate].wait()
        LOG.append(("end", "inward", params.get("who")))
        return {"said": reply.output_text}


class Outer(_Pattern):
    async def execute(self) -> Any:
        first = await self.context.tools["inward"].invoke({"who": "one", "gate": "inward"})
        second = await self.context.llm_client.generate(messages=[{"role": "user", "content": "outside"}])
        await self.context.tools["charge"].invoke({"who": "last", "gate": "last"})
        return [first["said"], second.output_text]


class Persistent(_Pattern):
    """Logs each number that it reaches, and repeats a call after any error."""

    async def execute(self) -> Any:
        for number in range(int(self.config["n"])):
            LOG.append(("seen", number))
            while True:
                try:
                    await self.context.tools["bulky"].invoke({"who": number, "gate": f"charge-{number}"})
                    break
                except Exception as error:
                    LOG.append(("caught", type(error).__name__, str(error)))
        return "done"


class Bulky(Charge):
    """Returns long results: a few of them fill a page of the journal."""

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        return {**await super().invoke(params, context), "receipt": "x" * 90_000}


class StartsTasks(_Pattern):
    """Starts tasks, awaits them or not, and logs how they end."""

    async def execute(self) -> Any:
        async def work(who: str) -> None:
            try:
                while True:
                    LOG.append(("tick", who))
                    await asyncio.sleep(0.005)
            finally:
                await asyncio.sleep(0.01)  # the clean-up takes a while
                LOG.append(("stopped", who))

        tasks = [asyncio.create_task(work("one")), asyncio.create_task(work("two"))]
        if self.config.get("waits", True):
            await asyncio.gather(*tasks)
        await asyncio.sleep(0.05)
        return "done"


class Blocking(Charge):
    """Blocks a thread until its gate is opened."""

    free: ClassVar[threading.Event] = threading.Event()

    def _block(self) -> str:
        LOG.append(("blocked",))
        Blocking.free.wait(60)
        LOG.append(("freed",))
        return "free"

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        return await asyncio.to_thread(self._block)


@tool
def block_a_thread() -> str:
    """Blocks one of the tool threads."""
    return Blocking()._block()


class CallsBlocking(_Pattern):
    async def execute(self) -> Any:
        return await self.context.tools["blocking"].invoke({})


class NeverLetsGo(_Pattern):
    async def execute(self) -> Any:
        LOG.append(("waiting",))
        while not GATES["let go"].is_set():
            with suppress(asyncio.CancelledError):
                await GATES["let go"].wait()


class LeavesACall(_Pattern):
    """Ends while a task of it still calls a tool."""

    async def execute(self) -> Any:
        self.left = asyncio.create_task(self.context.tools["blocking"].invoke({}))
        while ("blocked",) not in LOG:
            await asyncio.sleep(0)
        LOG.append(("ends",))
        return "done"


class LeavesItsTools(_Pattern):
    async def execute(self) -> Any:
        LOG.append(("left", self.context.tools["charge"]))
        return "done"


class Reconciling(OnceOnly):
    """Says of an interrupted call what `ANSWERS` holds: a `Reconciled`, an exception, or any other value."""

    async def reconcile(self, params: dict[str, Any], key: str, context: Any) -> Any:
        LOG.append(("reconcile", "charge", params.get("who"), key))
        answer = ANSWERS.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Drawer:
    """A toolset whose only tool charges."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.tool = Reconciling()

    async def open(self) -> None: ...

    async def list(self, context: Any) -> list[ToolPlugin]:
        return [self.tool]

    async def call(self, tool_id: str, params: dict[str, Any], context: Any) -> Any:
        return await self.tool.invoke(params, context)

    async def close(self) -> None: ...


class Till(Drawer):
    """Also says what became of an interrupted call."""

    async def reconcile(self, tool_id: str, params: dict[str, Any], key: str, context: Any) -> Any:
        assert tool_id == "charge"
        return await self.tool.reconcile(params, key, context)


ANSWERS: list[Any] = []


class Undeterred(_Pattern):
    """Charges, and charges somebody else if that fails."""

    async def execute(self) -> Any:
        try:
            return await self.context.tools["charge"].invoke({"who": "a", "gate": "charge"})
        except Exception:
            return await self.context.tools["charge"].invoke({"who": "b"})


class Clocked(_Pattern):
    """Charges once, with an argument that differs in every attempt."""

    count = 0

    async def execute(self) -> Any:
        Clocked.count += 1
        return await self.context.tools["charge"].invoke({"who": f"at {Clocked.count}", "gate": "charge"})


class Patient(OnceOnly):
    """Waits for a value before it charges."""

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        LOG.append(("begin", "charge", params.get("who"), context.idempotency_key))
        await context.receive("go")
        LOG.append(("end", "charge", params.get("who")))
        return {"charged": params.get("who")}
