"""One run in virtual time: the real runner, recorder and scripts with a real Redis. Only the clock is
simulated.

A process is an event loop whose clock jumps to the next timer. It is killed before or after any command to
Redis. The next process then claims the run. Calls of tools and models are counted here.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

from openagents_worker import Reconciled
from openagents_worker.agents import load_agents
from openagents_worker.errors import PermanentToolError
from openagents_worker.llm.base import CallInfo, LLMResponse
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.recorder import Outcome
from openagents_worker.runtime.runner import Runner
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.client import Cell, Store
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.keys import Keys
from openagents_worker.store.scripts import Wake
from openagents_worker.store.signals import signal_fact
from tests.support.runner import FixedLease

TOO_LATE_S = 2_000.0
"""Virtual seconds after which a run that has not ended hangs."""
TOOLS = (
    "do",
    "twin",
    "fed",
    "at",
    "quick",
    "flaky",
    "slow",
    "planB",
    "outer",
    "save",
    "item",
    "between",
    "progress",
)
MORE_TOOLS = ("won", "pay", "look", "charge", "report", "end", "after", "wait")

Program = Callable[["Api"], Awaitable[Any]]


def digest(*parts: Any) -> str:
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Effect:
    """A call that reached a tool or model."""

    content: str
    key: str
    subject: Any
    process: Process
    is_recorded: bool = False
    is_over: bool = False
    value: Any = None
    """What the call returns, if its tool can say later that it was made."""


@dataclass
class World:
    """All calls of tools and models in the life of a run."""

    rng: random.Random
    log: list[Effect] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    process: Process | None = None
    has_effects: bool = False
    """Whether the tools must not be repeated unasked. They know which calls were made."""
    steps: frozenset[str] = frozenset()
    """The tools that programs call as recorded functions."""

    @property
    def is_dead(self) -> bool:
        return self.process is None or self.process.is_dead

    def begin(self, content: str, key: str, subject: Any) -> Effect:
        assert self.process is not None
        for effect in self.log:
            if effect.key == key and effect.value is not None:
                self.problem("twice", f"{subject or content} has happened, and is made again")
            if effect.key == key and effect.is_recorded:
                self.problem("twice", f"{subject or content} was finished, and is made again")
            if effect.key == key and effect.process is self.process and not effect.is_over:
                self.problem("key", f"{subject or content} and {effect.subject} are made under one key")
        effect = Effect(content, key, subject, self.process)
        self.log.append(effect)
        return effect

    def problem(self, kind: str, text: str) -> None:
        self.problems.append((kind, text))


@dataclass(frozen=True)
class Asked:
    """The data that a program passes to a tool besides its arguments. It is not part of the call."""

    subject: Any = None
    latency_s: float | None = None
    sampled: bool = False
    fails: bool = False
    body: Callable[[], Awaitable[Any]] | None = None
    want: Any = None


_asked: ContextVar[Asked | None] = ContextVar("asked", default=None)
_world: ContextVar[World | None] = ContextVar("world", default=None)
_program: ContextVar[Program | None] = ContextVar("program", default=None)
_jitter: ContextVar[random.Random | None] = ContextVar("jitter", default=None)


def number_of_process() -> int:
    """0 for the first process of the run, 1 for the one after its death …"""
    world = _world.get()
    return world.process.number if world is not None and world.process is not None else 0


class Tool:
    """Returns its arguments after a while, and counts its calls."""

    durable_idempotent = True

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        """Nothing is configured."""

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        asked, world = _asked.get(), _world.get()
        assert asked is not None
        assert world is not None
        if world.is_dead:
            raise asyncio.CancelledError
        effect = world.begin(digest(params), context.idempotency_key, asked.subject)
        if world.has_effects and asked.body is None and not asked.fails:
            effect.value = _value(asked, world)
        try:
            await asyncio.sleep(_latency_s(asked))
            value: Any = effect.value or _value(asked, world)
            if asked.body is not None:
                value = await asked.body()
            if asked.fails:
                raise PermanentToolError("failed", "flaky")
            return {"value": value, "for": asked.want}
        finally:
            effect.is_over = True


def _value(asked: Asked, world: World) -> str:
    return f"s{world.rng.randrange(10**9)}" if asked.sampled else digest(asked.want)[:4]


class ToolWithEffects(Tool):
    """A tool that must not be repeated unasked, and that knows which of its calls were made."""

    durable_idempotent = False

    async def reconcile(self, params: dict[str, Any], idempotency_key: str, context: Any) -> Reconciled:
        asked, world = _asked.get(), _world.get()
        assert asked is not None
        assert world is not None
        for effect in world.log:
            if effect.key == idempotency_key and effect.value is not None:
                return Reconciled.done({"value": effect.value, "for": asked.want})
        return Reconciled.not_done()


async def _call_tool(args: list[Any], context: Any) -> Any:
    """A tool as a function."""
    return await Tool().invoke({"args": args}, context)


class Model:
    """Returns a digest of its prompt, or a sample."""

    provider_name = "test"
    model_id = "m"

    async def generate(self, *, messages: list[dict[str, Any]], **_: Any) -> LLMResponse:
        asked, world = _asked.get(), _world.get()
        assert asked is not None
        assert world is not None
        await asyncio.sleep(_latency_s(asked))
        value = f"s{world.rng.randrange(10**9)}" if asked.sampled else digest(asked.want)[:4]
        return LLMResponse(json.dumps({"value": value, "for": asked.want}))

    def count_tokens(self, text: str) -> int:
        return len(text)

    async def aclose(self) -> None:
        """Nothing to close."""


def _latency_s(asked: Asked) -> float:
    if asked.latency_s is not None:
        return asked.latency_s
    chance = _jitter.get()
    assert chance is not None
    return chance.choice((0.001, 0.01, 0.1, 0.1, 0.5, 1.5))


class Pattern:
    """Executes the program that the test has chosen."""

    context: Any

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        """Nothing is configured."""

    async def execute(self) -> Any:
        program, world, chance = _program.get(), _world.get(), _jitter.get()
        assert program is not None
        assert world is not None
        assert chance is not None
        return await program(Api(self.context, world, chance))


class ToolFailed(Exception):
    """The error of a tool."""


class Api:
    """What a program can use. `sleep` takes another time in each attempt."""

    def __init__(self, context: Any, world: World, chance: random.Random) -> None:
        self._context = context
        self._world = world
        self.rng = chance
        assert world.process is not None
        self.has_jitter = world.process.has_jitter
        self.process_number = world.process.number
        self.keep: Any = None
        """What the program leaves running."""

    async def tool(self, name: str, *args: Any, want: Any = None, **asked: Any) -> Any:
        want = want if want is not None else list(args)
        token = _asked.set(Asked(want=want, **asked))
        try:
            if name in self._world.steps:
                answer = await self._context.step(name, _call_tool, list(args), self._context)
            else:
                answer = await self._context.tools[name].invoke({"args": list(args)})
        except PermanentToolError as error:
            if self._world.process is not None and error.message == "failed":
                raise ToolFailed(name) from error
            raise
        finally:
            _asked.reset(token)
        return self._checked(name, want, answer)

    async def model(self, *messages: Any, clock: bool = False, **asked: Any) -> Any:
        token = _asked.set(Asked(want=list(messages), **asked))
        prompt = [
            {"role": "system", "content": str(self.rng.random() if clock else 0)},
            {"role": "user", "content": json.dumps(messages)},
        ]
        try:
            reply = await self._context.llm_client.generate(messages=prompt)
        finally:
            _asked.reset(token)
        return self._checked("model", list(messages), json.loads(reply.output_text))

    async def now(self) -> float:
        """The time as a recorded call without meaningful arguments."""

        async def make(_: CallInfo) -> Outcome:
            return Outcome(value=1000 + asyncio.get_running_loop().time() + self._world.rng.random())

        value: float = await self._context.recorder.call("now", "now", "", make)
        return value

    async def receive(self, name: str) -> None:
        """Receive a value that somebody sends while the run is parked, and check that it is that one."""
        value = await self._context.receive(name)
        if value != digest(name):
            self._world.problem("crossed", f"{name} received {value}")

    async def wait(self, delay_s: float) -> None:
        """A recorded sleep."""
        await self._context.sleep(delay_s)

    async def sleep(self) -> None:
        await asyncio.sleep(self.rng.choice((0, 0.02, 0.3, 1.0)) if self.has_jitter else 0)

    def _checked(self, name: str, want: Any, answer: Any) -> Any:
        if answer["for"] != json.loads(json.dumps(want)):
            self._world.problem("crossed", f"{name} {want} was given the answer to {answer['for']}")
        return answer["value"]


# --- a process that can be killed ------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """The process dies at its n-th command to Redis, before or after its execution, or at a record."""

    n: int
    after: bool = True
    of: Literal["commands", "records"] = "commands"


class Process:
    """A killable process: counts its commands."""

    def __init__(
        self,
        store: Store,
        kill: Kill | None,
        number: int,
        *,
        has_jitter: bool,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.number = number
        self.store = store
        self.has_jitter = has_jitter
        self.is_dead = False
        self.died = loop.create_future()
        self._kill = kill
        self._commands = 0
        self._had_records = self._records()

    async def command(self, do: Callable[[], Any]) -> Any:
        if self.is_dead:
            raise asyncio.CancelledError
        await asyncio.sleep(0.0005)
        self._commands += 1
        if self._dies("commands", self._commands, after=False):
            self.die()
        if self.is_dead:
            raise asyncio.CancelledError
        answer = do()
        if self._dies("commands", self._commands) or self._dies(
            "records", self._records() - self._had_records
        ):
            self.die()
            raise asyncio.CancelledError
        await asyncio.sleep(0.0005)
        return answer

    def _dies(self, of: str, count: int, *, after: bool = True) -> bool:
        kill = self._kill
        return kill is not None and (kill.of, kill.after) == (of, after) and count >= kill.n

    def _records(self) -> int:
        """The number of records of the run, without checkpoint 0."""
        length: Any = self.store.redis.llen(self.store.keys("journal", RUN))
        return max(0, length - 1)

    def die(self) -> None:
        self.is_dead = True
        if not self.died.done():
            self.died.set_result(None)


class StoreOfProcess:
    """The store as the coroutines of a process see it: each command is executed at once, or never."""

    def __init__(self, process: Process, world: World) -> None:
        self.cell = process.store.cell
        self._process = process
        self._world = world

    @property
    def keys(self) -> Keys:
        return self.cell.keys

    @property
    def codec(self) -> PayloadCodec:
        return self.cell.codec

    async def run(self, call: Any) -> Any:
        return await self._process.command(lambda: self._run(call))

    def _run(self, call: Any) -> Any:
        answer = self._process.store.run(call)
        if call.script.name == "commit":
            self._note_recorded()
        return answer

    def _note_recorded(self) -> None:
        """Mark the effects whose records are stored now."""
        store = self._process.store
        texts: Any = store.redis.lrange(store.keys("journal", RUN), 0, -1)
        records = [json.loads(text) for text in texts]
        known = {record["call"] for record in records if "cancelled" not in record["outcome"]}
        for effect in self._world.log:
            if effect.key.split(":", 2)[2] in known:
                effect.is_recorded = True

    async def run_until(self, call: Any, until: Callable[[], bool], *, on_disk: bool = False) -> Any:
        return await self.run(call)

    async def ask(self, question: Callable[[Any], Any]) -> Any:
        return await self._process.command(lambda: question(self._process.store.redis))

    async def ask_until(self, question: Callable[[Any], Any], until: Callable[[], bool]) -> Any:
        return await self.ask(question)


class Deadlock(BaseException):
    """No task can continue."""


class _Selector(selectors.SelectSelector):
    loop: Loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise Deadlock
        self.loop.now_s += max(0.0, timeout)
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to its next timer."""

    def __init__(self) -> None:
        self.now_s = 0.0
        selector = _Selector()
        super().__init__(selector)
        selector.loop = self

    def time(self) -> float:
        return self.now_s


RUN = "r1"
MANY_ATTEMPTS = 100  # a program has fewer waits


@dataclass
class Case:
    """A program, executed through its kills to its end. `problems` lists (kind, text).

    Kinds: `crossed` (a wrong outcome), `twice` (a finished effect was repeated), `key` (a call in flight was
    repeated with another key, or two calls have one key), `mismatch`, `hang`, `lost`, `result`.
    """

    program: Program
    redis_url: str
    seed: int
    kills: Sequence[Kill]
    has_jitter: bool = True
    depends_on_time: bool = False
    is_sampled: bool = False
    has_effects: bool = False
    steps: frozenset[str] = frozenset()

    def run(self) -> list[tuple[str, str]]:
        world = World(random.Random(self.seed), has_effects=self.has_effects, steps=self.steps)
        output = self._execute(world, [*self.kills, None], self.has_jitter)
        self._count(world)
        kinds = {kind for kind, _ in world.problems}
        if not (self.depends_on_time or self.is_sampled or kinds & {"mismatch", "hang"}):
            alone = World(random.Random(self.seed), has_effects=self.has_effects, steps=self.steps)
            expected = self._execute(alone, [None], False)
            if json.dumps(expected, sort_keys=True) != json.dumps(output, sort_keys=True):
                world.problem("result", f"{output!r} instead of {expected!r}")
            for subject in {effect.subject for effect in alone.log} - {
                e.subject for e in world.log if e.is_recorded
            }:
                world.problem("lost", f"{subject} was never made")
        return list(dict.fromkeys(world.problems))

    def _execute(self, world: World, kills: Sequence[Kill | None], has_jitter: bool) -> Any:
        store = Store(Cell(self.redis_url), max_connections=1)
        try:
            store.redis.flushall()
            _submit(store)
            left, numbers = list(kills), iter(range(MANY_ATTEMPTS))
            while left and (number := next(numbers, None)) is not None:
                ended, output = self._attempt(world, store, left[0], number, has_jitter)
                if ended:
                    return output
                if not self._ends_a_wait(world, store):  # the process was killed
                    _reclaim(store)
                    del left[0]
            if left:
                world.problem("hang", "the run parks again and again")
            return None
        finally:
            store.redis.flushall()
            store.close()

    def _ends_a_wait(self, world: World, store: Store) -> bool:
        """If the run is parked, end one of its waits, or several, so that it continues."""
        waits: Any = store.redis.hget(store.keys("run", RUN), "waits")
        if store.redis.hget(store.keys("run", RUN), "state") != "waiting":
            return False
        signals = [wait["name"] for wait in json.loads(waits) if wait["kind"] == "signal"]
        has_time = store.redis.zscore(store.keys("timeouts"), RUN) is not None
        if has_time and (not signals or world.rng.random() < 0.5):
            _time_out(store)
        else:
            for name in world.rng.sample(signals, world.rng.randint(1, len(signals))):
                send(store, name)
        return True

    def _attempt(
        self, world: World, store: Store, kill: Kill | None, number: int, has_jitter: bool
    ) -> tuple[bool, Any]:
        loop = Loop()
        loop.set_exception_handler(lambda *_: None)  # errors of tasks of a dead process are ignored
        chance = random.Random(self.seed * 1000 + number)

        async def main() -> tuple[bool, Any]:
            process = world.process = Process(store, kill, number, has_jitter=has_jitter, loop=loop)
            for variable, value in ((_world, world), (_program, self.program), (_jitter, chance)):
                variable.set(value)  # type: ignore[attr-defined]  # of three types
            runner, assembly = _runner(process, world, f"w{number}")
            executing = asyncio.create_task(runner.execute(RUN))
            await asyncio.wait(
                {executing, process.died}, return_when=asyncio.FIRST_COMPLETED, timeout=TOO_LATE_S
            )
            if process.is_dead:
                return False, None
            if not executing.done():
                world.problem("hang", "nothing has ended")
                process.die()
                return True, None
            await assembly.aclose()
            return self._ending(world, store, executing)

        try:
            return loop.run_until_complete(main())
        except Deadlock:
            world.problem("hang", "nothing will ever happen any more")
            if world.process is not None:
                world.process.is_dead = True
            return True, None
        finally:
            _bury(loop)

    def _ending(self, world: World, store: Store, executing: asyncio.Task[Any]) -> tuple[bool, Any]:
        executing.result()
        result: Any = store.redis.hget(store.keys("run", RUN), "result")
        if result is None:
            return False, None  # it is parked
        ended = json.loads(result)
        details = ended.get("error_details")
        if details and details["code"] == "run.replay_mismatch":
            world.problem("mismatch", details["message"])
        elif details:
            return True, f"{details['code']}: {details['message']}"
        return True, ended["final_output"]

    def _count(self, world: World) -> None:
        finished: dict[str, list[Effect]] = {}
        for effect in world.log:
            if effect.is_recorded and effect.subject:
                finished.setdefault(effect.subject, []).append(effect)
        keys: dict[tuple[Any, str], set[str]] = {}
        made: dict[tuple[Any, str], int] = {}
        for effect in world.log:
            if effect.subject:
                keys.setdefault((effect.subject, effect.content), set()).add(effect.key)
                made[effect.subject, effect.content] = made.get((effect.subject, effect.content), 0) + 1
        for (subject, _), used in keys.items():
            if len(used) > 1:
                world.problem("key", f"{subject} was made under {len(used)} keys")
        for subject, effects in finished.items():
            if len({effect.key for effect in effects}) > 1:
                world.problem("twice", f"{subject} was finished {len(effects)} times")


def _runner(process: Process, world: World, name: str) -> tuple[Runner, Assembly]:
    here = __name__
    impl = f"{here}.ToolWithEffects" if world.has_effects else f"{here}.Tool"
    tools = [{"id": tool, "impl": impl} for tool in (*TOOLS, *MORE_TOOLS)]
    agent = {
        "id": "a",
        "name": "a",
        "pattern": {"impl": f"{here}.Pattern"},
        "memory": {"type": "buffer"},
        "llm": {"provider": "mock"},
        "tools": tools,
    }
    assembly = Assembly(load_agents(json.dumps({"agents": [agent]}), env={}), env={})
    assembly._models["a"] = Model()
    lease = FixedLease(f"{name}:{process.store.cell.prefix}")
    process.store.run(scripts.register(incarnation=lease.incarnation, lease_ms=600_000, agents=[]))

    async def send(_: Sequence[Wake]) -> None:
        """Does nothing: the test wakes the next process itself."""

    runner = Runner(
        store=StoreOfProcess(process, world),  # type: ignore[arg-type]  # as far as a runner uses one
        lease=lambda: lease,
        assembly=assembly,
        settings=load_settings({"OPENAGENTS_REDIS_URL": process.store.cell.url}),
        send_wakes=send,
    )
    return runner, assembly


def _submit(store: Store) -> None:
    request = {"agent_id": "a", "session_id": "s1", "input_text": "hi", "run_id": RUN}
    store.run(
        scripts.submit(
            run_id=RUN,
            agent_id="a",
            session_id="s1",
            queue="",
            default_queue="agents",
            digest="d",
            uid="u1",
            request=json.dumps(request),
            canvas="",
            durable=True,
            delay_ms=0,
            reject_if_busy=False,
            parent_run_id="",
        )
    )


def send(store: Store, name: str) -> None:
    """Send the value that belongs to this name."""
    call = scripts.fact(
        run_id=RUN,
        name=signal_fact(name),
        value=json.dumps(digest(name)),
        message_id="",
        max_facts=1000,
        max_bytes=100_000,
    )
    store.run(call)


def _time_out(store: Store) -> None:
    """The time of the first wait of the parked run is over."""
    facts: Any = store.redis.hgetall(store.keys("facts", RUN))
    waits = [(json.loads(text), name) for name, text in facts.items() if name.startswith("wait:")]
    first, name = min(
        ((wait, name) for wait, name in waits if "until_ms" in wait), key=lambda each: each[0]["until_ms"]
    )
    store.redis.hset(store.keys("facts", RUN), name, json.dumps({**first, "until_ms": 1}))
    store.redis.zadd(store.keys("timeouts"), {RUN: 1})
    assert [wake.run_id for wake in store.run(scripts.wake(limit=10)).wakes] == [RUN]


def _reclaim(store: Store) -> None:
    """The lease of the dead process is over. Its run is reclaimed."""
    workers: Any = store.redis.zrange(store.keys("workers"), 0, -1)
    store.redis.zadd(store.keys("workers"), dict.fromkeys(workers, 1))
    while store.run(scripts.reclaim(limit=100, max_recoveries=100, blameless=True)).incarnation:
        pass


def _bury(loop: Loop) -> None:
    """Close the loop of a dead process, so that none of its code continues."""
    for _ in range(20):
        tasks = asyncio.all_tasks(loop)
        if not tasks:
            break
        for task in tasks:
            task.cancel()
        loop.call_soon(loop.stop)
        with suppress(BaseException):  # errors of code of a dead process are ignored
            loop.run_forever()
    loop.close()
