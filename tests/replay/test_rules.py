"""Each rule of replay has a program that fails without it.

The programs are counterexamples to simpler rules. A rule is switched off by removing one part of the real
code. Then at least one of the seeds must show the problem that the rule prevents.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from openagents_worker.runtime import call_ids, replay
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.replay import ReplayByContent
from openagents_worker.runtime.replay_waits import ReplayWaits
from openagents_worker.runtime.turns import OutcomeOrder
from openagents_worker.runtime.unused_records import UnusedRecords
from tests.replay.world import Api, Case, Kill

SEEDS = range(25)
FEW = 8
"""Seeds of a program of which nothing is wanted but that it goes well; the others are left to `slow`."""


@dataclass(frozen=True)
class Counterexample:
    """A program, the numbers of records after which its processes die, and its properties."""

    program: Callable[[Api], Awaitable[Any]]
    records: Sequence[int]
    depends_on_time: bool = False
    is_sampled: bool = False
    has_jitter: bool = True
    seeds: Sequence[int] = SEEDS
    """One where nothing is left to chance."""

    def problems(self, redis_url: str, seed: int) -> list[tuple[str, str]]:
        kills = [Kill(n, of="records") for n in self.records]
        return Case(
            self.program,
            redis_url,
            seed,
            kills,
            has_jitter=self.has_jitter,
            depends_on_time=self.depends_on_time,
            is_sampled=self.is_sampled,
        ).run()


async def best_of(api: Api) -> Any:
    """Equal prompts in parallel. The replies differ and are used."""

    async def vote(index: int) -> bool:
        await api.sleep()
        reply = await api.model("vote", sampled=True)
        await api.sleep()
        return bool(await api.tool("save", index, reply, subject=f"save{index}"))

    return await asyncio.gather(*(vote(index) for index in range(3)))


async def twins(api: Api) -> Any:
    """Equal effects in parallel. The second one commits first."""

    async def pay() -> Any:
        await api.sleep()
        return await api.tool("pay", 5)

    return await asyncio.gather(pay(), pay())


async def pool(api: Api) -> Any:
    """After a crash another worker takes the item that was in flight."""
    queue: asyncio.Queue[int] = asyncio.Queue()
    out: dict[int, Any] = {}
    for item in range(6):
        queue.put_nowait(item)

    async def worker() -> None:
        while not queue.empty():
            item = queue.get_nowait()
            await api.sleep()
            out[item] = await api.tool("item", item, subject=f"item{item}")

    await asyncio.gather(worker(), worker())
    return [out[item] for item in sorted(out)]


async def clocks(api: Api) -> Any:
    """A recorded clock in each branch."""

    async def charge(index: int) -> bool:
        await api.sleep()
        now = await api.now()
        await api.sleep()
        return bool(await api.tool("charge", index, now, subject=f"charge{index}"))

    return await asyncio.gather(*(charge(index) for index in range(3)))


async def inside_and_outside(api: Api) -> Any:
    """A call inside another call equals one outside."""

    async def body() -> Any:
        return await api.tool("pay", 5, subject="inside")

    async def outer() -> Any:
        await asyncio.sleep(api.rng.choice((0, 0.1, 8)))
        return await api.tool("outer", 1, body=body, want="o")

    async def plain() -> Any:
        await api.sleep()
        return await api.tool("pay", 5, subject="outside")

    return await asyncio.gather(outer(), plain())


async def order_of_completion(api: Api) -> Any:
    """The call that ends first determines the next arguments. The program does not depend on other time."""
    out: list[Any] = []

    async def look(index: int) -> Any:
        return await api.tool("look", index)

    for each in asyncio.as_completed([look(index) for index in range(4)]):
        out.append(await each)
    await api.tool("report", out, subject="report")
    return await api.tool("end", out, subject="end")


async def first_of_several(api: Api) -> Any:
    """The first of several calls is used. The others continue."""

    async def look(index: int) -> Any:
        await api.sleep()
        return await api.tool("look", index)

    tasks = [asyncio.create_task(look(index)) for index in range(3)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await api.tool("won", "x", subject="won")
    return 1


async def one_is_cancelled(api: Api) -> Any:
    """One of two equal calls is cancelled."""

    async def slow(_: int) -> Any:
        if api.rng.random() < 0.5:
            await asyncio.sleep(0.001)
        return await api.tool("slow", "x", latency_s=0.5)

    kept, dropped = asyncio.create_task(slow(1)), asyncio.create_task(slow(2))
    await asyncio.sleep(0.2)
    dropped.cancel()
    await asyncio.wait([dropped])
    answer = await kept
    await api.tool("after", answer, subject="after")
    return answer


async def cancelled_no_more(api: Api) -> Any:
    """The program gives a call half a second, and more in the next process."""
    limit_s = 0.2 if api.process_number == 0 else None
    try:
        async with asyncio.timeout(limit_s):
            await api.tool("slow", "x", latency_s=0.5)
    except TimeoutError:
        await api.tool("after", "late", subject="after")
    return 1


async def clock_in_a_prompt(api: Api) -> Any:
    """The system prompt of each branch holds the time."""

    async def charge(index: int) -> Any:
        await api.sleep()
        reply = await api.model(f"u{index}", clock=True)
        await api.sleep()
        return [reply, await api.tool("charge", index, reply, subject=f"charge{index}")]

    return await asyncio.gather(*(charge(index) for index in range(3)))


async def begun_outer(api: Api) -> Any:
    """An outer call in flight with a finished call inside. The argument of the outer call is a clock."""

    async def body() -> Any:
        paid = await api.tool("pay", 1, subject="pay")
        await api.tool("wait", 1)
        return paid

    return await api.tool("outer", api.rng.random(), body=body, want="o")


async def equal_outer_calls(api: Api) -> Any:
    """Equal outer calls in parallel, with finished calls inside."""

    async def outer(index: int) -> Any:
        async def body() -> Any:
            await api.tool("pay", index, subject=f"pay{index}")
            return await api.tool("wait", index)

        await api.sleep()
        return await api.tool("outer", "same", body=body, want="o")

    return await asyncio.gather(outer(0), outer(1))


async def tasks_in_the_order_of_a_set(api: Api) -> Any:
    """`asyncio.as_completed` creates its tasks in the order of a set."""

    async def look(index: int) -> Any:
        return bool(await api.tool("charge", index, await api.now(), subject=f"charge{index}"))

    coroutines = [look(index) for index in range(4)]
    api.rng.shuffle(coroutines)
    out = [await each for each in asyncio.as_completed(coroutines)]
    return sorted(out)


async def slow_to_ask(api: Api) -> Any:
    """A branch makes its recorded call after the pattern has nothing left to do."""

    async def look() -> Any:
        await api.sleep()
        return await api.tool("look", 1)

    task = asyncio.create_task(look())
    await api.tool("do", 1)
    await api.tool("wait", 1, latency_s=3.0)
    api.keep = task
    return 1


async def reads_what_others_did(api: Api) -> Any:
    """During a call, another branch changes something without a recorded call."""
    done: list[str] = []

    async def other() -> Any:
        for _ in range(10):
            await asyncio.sleep(0)
        done.append("other")
        return await api.tool("wait", 1, latency_s=1.0)

    async def reader() -> Any:
        await api.tool("do", 1, latency_s=0.01)
        return await api.tool("report", done, subject="report", latency_s=0.01)

    return await asyncio.gather(reader(), other())


async def waits_for_many(api: Api) -> Any:
    """An outcome waits for six others. Each comes in time, but all of them take longer than one may."""
    seen: list[int] = []

    async def one_after_the_other() -> None:
        for number in range(6):
            await asyncio.sleep(0 if api.process_number == 0 else 0.15)
            await api.tool("look", number, latency_s=0.01)
            seen.append(number)

    async def last() -> Any:
        await api.tool("do", 1, latency_s=0.2)
        return await api.tool("report", seen, subject="report", latency_s=0.01)

    return (await asyncio.gather(last(), one_after_the_other()))[0]


async def cancelled_while_it_waits_for_its_turn(api: Api) -> Any:
    """The second process cancels a call whose recorded outcome waits for another one."""
    limit_s = 0.05 if api.process_number else None

    async def before() -> Any:
        await asyncio.sleep(3.0 if api.process_number == 1 else 0)
        return await api.tool("look", 1, latency_s=0.01)

    first = asyncio.create_task(before())
    try:
        async with asyncio.timeout(limit_s):
            await api.tool("slow", "x", latency_s=0.1)
    except TimeoutError:
        await api.tool("after", "late", subject="after", latency_s=0.01)
    return await first


async def cancelled_with_calls_inside(api: Api) -> Any:
    """An outer call was cancelled, a call inside it was finished. The next process gives it more time."""

    async def body() -> Any:
        paid = await api.tool("pay", 1, subject="pay", latency_s=0.01)
        await api.tool("wait", 1, latency_s=1.0)
        return paid

    try:
        async with asyncio.timeout(0.2 if api.process_number == 0 else None):
            await api.tool("outer", 1, body=body, want="o")
    except TimeoutError:
        await api.tool("after", "late", subject="after")
    return 1


CASES = {
    "best of": Counterexample(best_of, [2, 2], is_sampled=True),
    "twins": Counterexample(twins, [1]),
    "pool": Counterexample(pool, [3, 2]),
    "clocks": Counterexample(clocks, [2, 2]),
    "inside and outside": Counterexample(inside_and_outside, [1, 1]),
    "order of completion": Counterexample(order_of_completion, [5], depends_on_time=True, has_jitter=False),
    "first of several": Counterexample(first_of_several, [2, 1], depends_on_time=True),
    "one is cancelled": Counterexample(one_is_cancelled, [1, 1]),
    "cancelled no more": Counterexample(cancelled_no_more, [1], depends_on_time=True),
    "clock in a prompt": Counterexample(clock_in_a_prompt, [3, 1]),
    "equal outer calls": Counterexample(equal_outer_calls, [1, 1]),
    "tasks in the order of a set": Counterexample(tasks_in_the_order_of_a_set, [6]),
    "slow to ask": Counterexample(slow_to_ask, [3], depends_on_time=True),
    "reads what others did": Counterexample(reads_what_others_did, [2], has_jitter=False, seeds=[1]),
    "waits for many": Counterexample(waits_for_many, [8], has_jitter=False, seeds=[1]),
    "cancelled before its turn": Counterexample(
        cancelled_while_it_waits_for_its_turn, [2, 1], depends_on_time=True, has_jitter=False, seeds=[1]
    ),
    "cancelled, calls inside": Counterexample(
        cancelled_with_calls_inside, [3], depends_on_time=True, has_jitter=False, seeds=[1]
    ),
}


@pytest.mark.share(of=3)
@pytest.mark.parametrize(
    "part", [slice(FEW), pytest.param(slice(FEW, None), marks=pytest.mark.slow)], ids=["few", "the others"]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_nothing_goes_wrong_with_the_rules(redis_url: str, case: Counterexample, part: slice) -> None:
    """The counterexamples to simpler rules succeed with these rules."""
    found = [problem for seed in case.seeds[part] for problem in case.problems(redis_url, seed)]
    assert found == []


def test_a_begun_call_whose_arguments_hold_a_clock_is_a_mismatch(redis_url: str) -> None:
    """The finished call inside it is not made again. The run fails and says why."""
    for seed in SEEDS[:10]:
        found = Counterexample(begun_outer, [1], depends_on_time=True).problems(redis_url, seed)
        assert {kind for kind, _ in found} == {"mismatch"}
        assert "which was begun" in found[0][1]


@pytest.mark.share(of=4)
@pytest.mark.parametrize("command", range(2, 9))
@pytest.mark.parametrize("after_ms", [0, 0.3, 0.6, 0.9, 1.2, 1.5, 2.1, 20.1, 20.6])
def test_a_cancellation_during_any_commit_is_replayed(redis_url: str, after_ms: float, command: int) -> None:
    """Also during the commit of checkpoint 0. The call ends as before, and no record stays unused."""

    async def program(api: Api) -> Any:
        first = asyncio.create_task(api.tool("do", 1, subject="first", latency_s=0.001))
        await asyncio.sleep(after_ms / 1000)
        first.cancel()
        await asyncio.wait([first])
        await api.tool("after", first.cancelled(), subject="after", latency_s=0.001)
        return await api.tool("end", 1, subject="end", latency_s=0.001)

    kills = [Kill(command), Kill(command + 1)]
    assert Case(program, redis_url, 1, kills, has_jitter=False, depends_on_time=True).run() == []


Switch = Callable[[pytest.MonkeyPatch], None]


def _nodes_have_no_names(patch: pytest.MonkeyPatch) -> None:
    original = call_ids.Nodes.frame_of_child

    def frame_of_child(self: Any, parent: Any, coro: Any) -> Any:
        frame = original(self, parent, coro)
        frame.node.path = ""
        return frame

    patch.setattr(call_ids.Nodes, "frame_of_child", frame_of_child)


def _tasks_have_no_arguments_digest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(call_ids, "_arguments_digest", lambda _: "")


def _ids_are_counted_by_the_attempt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(call_ids.CallIdNumbering, "mark_used", lambda *_: None)


def _calls_have_no_scope(patch: pytest.MonkeyPatch) -> None:
    original = replay.content_digest
    patch.setattr(replay, "content_digest", lambda _, *more: original("", *more))


def _any_record_is_available(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReplayByContent, "_is_available", lambda *_: True)


def _no_node_diverges(patch: pytest.MonkeyPatch) -> None:
    async def contradicted(self: Any, query: Any) -> None:
        own = self._next_unused_of_node(query)
        if own is not None and self._open_call_for(query) is None:
            raise replay.ReplayContradiction("at once")

    patch.setattr(ReplayByContent, "_find_changed_or_contradict", contradicted)
    patch.setattr(ReplayByContent, "_mark_diverged", lambda *_: None)


def _outcomes_have_no_order(patch: pytest.MonkeyPatch) -> None:
    async def at_once(*_: Any, **__: Any) -> None:
        """Does not wait."""

    patch.setattr(OutcomeOrder, "wait_for", at_once)
    patch.setattr(OutcomeOrder, "wait_for_all", at_once)


def _prompts_have_no_core(patch: pytest.MonkeyPatch) -> None:
    original = ReplayByContent.enter
    patch.setattr(ReplayByContent, "enter", lambda self, k, n, d, _="": original(self, k, n, d, ""))


def _cancelled_calls_wait_for_ever(patch: pytest.MonkeyPatch) -> None:
    original = ReplayByContent.wait_for_turn

    async def wait_for_turn(self: Any, query: Any, record: Any) -> bool:
        if self._unused.was_cancelled(record):
            await self._latch.wait()
        return await original(self, query, record)

    patch.setattr(ReplayByContent, "wait_for_turn", wait_for_turn)


def _unfinished_calls_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UnusedRecords, "_add_open", lambda *_: None)


def _clocks_are_shared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replay, "OWN_KINDS", frozenset())
    patch.setattr(ReplayByContent, "_is_available", lambda *_: True)


def _the_end_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    original = ReplayWaits.until

    async def until(self: Any, condition: Any, keys: Any, **more: Any) -> bool:
        return condition() if more.get("check_on_progress") else await original(self, condition, keys, **more)

    patch.setattr(ReplayWaits, "until", until)


def _outcomes_do_not_wait_for_other_tasks(patch: pytest.MonkeyPatch) -> None:
    original = OutcomeOrder._settle

    def settle(self: Any) -> None:
        if not self._remaining:
            original(self)

    patch.setattr(OutcomeOrder, "_settle", settle)


def _order_is_given_up_after_one_wait(patch: pytest.MonkeyPatch) -> None:
    async def in_time(self: Any, future: asyncio.Future[None], at_most_s: float) -> None:
        timer = self._loop.call_later(at_most_s, self.give_up)
        try:
            await future
        finally:
            timer.cancel()

    patch.setattr(OutcomeOrder, "_wait_while_progressing", in_time)


def _a_waiting_outcome_cannot_be_cancelled(patch: pytest.MonkeyPatch) -> None:
    async def wait_for_turn(self: Any, query: Any, record: Any) -> bool:
        return bool(await self.rules.wait_for_turn(query, record))

    patch.setattr(Recorder, "_wait_for_turn", wait_for_turn)


def _calls_inside_a_cancelled_call_are_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UnusedRecords, "reopen_inside", lambda *_: None)


SWITCHES: dict[str, tuple[Switch, str]] = {
    "nodes are named": (_nodes_have_no_names, "best of"),
    "and after their arguments": (_tasks_have_no_arguments_digest, "tasks in the order of a set"),
    "an id is given once": (_ids_are_counted_by_the_attempt, "twins"),
    "calls have a scope": (_calls_have_no_scope, "inside and outside"),
    "others' records wait": (_any_record_is_available, "best of"),
    "a contradiction waits": (_no_node_diverges, "pool"),
    "answers have an order": (_outcomes_have_no_order, "order of completion"),
    "prompts have a core": (_prompts_have_no_core, "clock in a prompt"),
    "cancelled calls are made again": (_cancelled_calls_wait_for_ever, "cancelled no more"),
    "begun calls are known": (_unfinished_calls_are_forgotten, "equal outer calls"),
    "a clock is one's own": (_clocks_are_shared, "clocks"),
    "the end waits": (_the_end_does_not_wait, "slow to ask"),
    "others go first": (_outcomes_do_not_wait_for_other_tasks, "reads what others did"),
    "each answer begins a wait anew": (_order_is_given_up_after_one_wait, "waits for many"),
    "a cancellation before an answer's turn is recorded": (
        _a_waiting_outcome_cannot_be_cancelled,
        "cancelled before its turn",
    ),
    "calls inside a cancelled one come back": (
        _calls_inside_a_cancelled_call_are_lost,
        "cancelled, calls inside",
    ),
}


@pytest.mark.share(of=3)
@pytest.mark.parametrize("rule", SWITCHES)
def test_without_a_rule_its_program_fails(redis_url: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule is needed."""
    switch_off, case = SWITCHES[rule]
    switch_off(monkeypatch)
    assert any(CASES[case].problems(redis_url, seed) for seed in CASES[case].seeds)
