"""Many and large events: no script call gets more than a batch, and no event is lost."""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

import pytest

from openagents_worker.llm.base import Delta, DeltaKind
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.runtime import event_writer as writer
from openagents_worker.runtime import reply_stream
from openagents_worker.store.scripts import ScriptCall
from tests.support.clocks import LoopClock
from tests.support.runner import Process, agent, process
from tests.support.waiting import await_for

PLUGINS = __name__


class Talks(PatternPlugin):
    """Emits events without end, and makes no calls."""

    class Config(PatternPlugin.Config):
        events: int = 0
        chars: int = 1

    async def execute(self) -> str:
        for number in range(self.cfg.events):
            await self.emit("said", number=number, text="x" * self.cfg.chars)
            MOST_PENDING.append(len(self.context.recorder._writer._pending) // 2)  # type: ignore[attr-defined]
        reply = await self.context.llm_client.generate(messages=[{"role": "user", "content": "hi"}])
        return str(reply.output_text)


class Shouts(PatternPlugin):
    """Emits one event that may be too large, and returns how that ended."""

    class Config(PatternPlugin.Config):
        name: str = "said"
        parts: int = 1
        rows: int = 1

    async def execute(self) -> str:
        try:
            await self.emit(
                self.cfg.name,
                parts=[["ü" * 450] * 40] * self.cfg.parts,
                rows=[[[1] * 200] * 200] * self.cfg.rows,
            )
        except Exception as error:
            outcome = str(getattr(error, "code", error))
        else:
            outcome = "taken"
        await self.context.llm_client.generate(messages=[{"role": "user", "content": outcome}])
        return outcome


class Streams(PatternPlugin):
    """Publishes pieces of a reply for a second while Redis does not answer, and waits until all are sent."""

    redis_answers: ClassVar[asyncio.Event]

    async def execute(self) -> str:
        clock, run_writer = LoopClock(), self.context.recorder._writer  # type: ignore[attr-defined]
        for _ in range(20):
            run_writer.delta("c", "x")
            clock.forward(reply_stream.PUBLISH_S)
            for _ in range(5):  # the timer, the flush, and its request
                await asyncio.sleep(0)
            MOST_PENDING.append(len(run_writer._flushing))
        self.redis_answers.set()
        await await_for(lambda: not run_writer._flushing, "all pieces are sent")
        reply = await self.context.llm_client.generate(messages=[{"role": "user", "content": "hi"}])
        return str(reply.output_text)


class Writes(PatternPlugin):
    """Publishes the pieces of a reply for two seconds, 50 a second, beside other streamed replies."""

    class Config(PatternPlugin.Config):
        others: int = 0

    async def execute(self) -> str:
        clock, run_writer = LoopClock(), self.context.recorder._writer  # type: ignore[attr-defined]
        for _ in range(self.cfg.others):
            run_writer._pace.begin()
        for _ in range(100):
            run_writer.delta("c", "x")
            clock.forward(0.02)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await await_for(lambda: not run_writer._flushing, "the pieces are sent")
        run_writer.end_deltas("c")
        for _ in range(self.cfg.others):
            run_writer._pace.end()
        return "done"


class Interrupts(PatternPlugin):
    """Emits an event while a piece of a reply waits beside a thousand other replies."""

    async def execute(self) -> str:
        clock, run_writer = LoopClock(), self.context.recorder._writer  # type: ignore[attr-defined]
        await run_writer.flush()
        for _ in range(1_000):
            run_writer._pace.begin()
        run_writer.delta("c", "x")
        await self.emit("said", number=1)
        clock.forward(writer.FLUSH_S)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert run_writer._flushing, "the event is not sent"
        await await_for(lambda: not run_writer._flushing, "the event is sent")
        for _ in range(1_000):
            run_writer._pace.end()
        return "done"


class IsBusy(PatternPlugin):
    """Emits an event in a process whose event loop is late by some time."""

    class Config(PatternPlugin.Config):
        late_s: float

    async def execute(self) -> str:
        clock, run_writer = LoopClock(), self.context.recorder._writer  # type: ignore[attr-defined]
        await run_writer.flush()
        began_s = asyncio.get_running_loop().time()
        await self.emit("said", number=1)
        while not run_writer._flushing:
            clock.forward(writer.FLUSH_S + self.cfg.late_s)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        WAITED_S.append(asyncio.get_running_loop().time() - began_s)
        await await_for(lambda: not run_writer._flushing, "the event is sent")
        return "done"


MOST_PENDING: list[int] = []
WAITED_S: list[float] = []


def _record_script_calls(process: Process) -> list[tuple[str, int, int]]:
    """Record each script call of the process from now on: name, number of list items, bytes."""
    sizes: list[tuple[str, int, int]] = []
    run_until = process.store.run_until

    async def noting(call: ScriptCall[Any], *rest: Any, **more: Any) -> Any:
        words = [word for arg in call.args if isinstance(arg, list | tuple) for word in arg]
        sizes.append((call.script.name, len(words), sum(map(len, words))))
        return await run_until(call, *rest, **more)

    process.store.run_until = noting  # type: ignore[method-assign]
    return sizes


def _talks(**config: Any) -> dict[str, Any]:
    return agent(pattern={"impl": f"{PLUGINS}.Talks", "config": config})


async def test_thirty_thousand_events_are_stored_in_batches(redis_url: str) -> None:
    """Each is stored once and in order. The pattern waits for Redis."""
    MOST_PENDING.clear()
    async with process(redis_url, _talks(events=30_000)) as worker:
        sizes = _record_script_calls(worker)
        record = await worker.run()
        newest = await worker.store.redis.xrevrange(worker.store.keys("events", "r1"), count=1_000)
    payloads = [entry["payload"] for _, entry in reversed(newest) if entry["name"] == "said"]
    numbers = [json.loads(payload)["number"] for payload in payloads]

    assert (record.state, record.result and record.result.final_output) == ("completed", "hello")
    assert int(newest[0][0].partition("-")[0]) > 30_000
    assert numbers == list(range(30_000))[-len(numbers) :]
    assert max(words for _, words, _ in sizes) <= 2 * writer.BATCH_EVENTS + 10
    assert max(MOST_PENDING) <= writer.PENDING_EVENTS + 1


async def test_pieces_that_wait_for_redis_are_sent_together(redis_url: str) -> None:
    """A run has one request for its pieces in progress. All that arrive meanwhile go with the next one."""
    MOST_PENDING.clear()
    Streams.redis_answers = asyncio.Event()
    sent: list[str] = []
    async with process(redis_url, agent(pattern={"impl": f"{PLUGINS}.Streams"})) as worker:
        run_until = worker.store.run_until

        async def late(call: ScriptCall[Any], *rest: Any, **more: Any) -> Any:
            words = [word for arg in call.args if isinstance(arg, list | tuple) for word in arg]
            if texts := [word for word in words if '"kind":"text"' in word]:
                sent.append("".join(json.loads(text[text.index("{") :])["text"] for text in texts))
                await Streams.redis_answers.wait()
            return await run_until(call, *rest, **more)

        worker.store.run_until = late  # type: ignore[method-assign]
        record = await worker.run()

    assert record.state == "completed"
    assert max(MOST_PENDING) == 1
    assert [len(text) for text in sent[:2]] == [1, 19]  # and then the reply of the model


@pytest.mark.parametrize(("others", "most"), [(0, 40), (24, 40), (49, 20), (99, 10), (5_000, 4)])
async def test_pieces_are_sent_less_often_beside_many_other_replies(
    redis_url: str, others: int, most: int
) -> None:
    """At most 20 times a second for one run, 500 times for all runs of the process; at least twice."""
    async with process(
        redis_url, agent(pattern={"impl": f"{PLUGINS}.Writes", "config": {"others": others}})
    ) as worker:
        sizes = _record_script_calls(worker)
        record = await worker.run()

    assert record.state == "completed"
    sent = [name for name, _, _ in sizes if name == "emit"]
    assert most // 2 <= len(sent) <= most + 1


async def test_an_event_does_not_wait_for_the_pieces_of_a_reply(redis_url: str) -> None:
    """It is stored after the usual time, and takes the pieces along."""
    async with process(redis_url, agent(pattern={"impl": f"{PLUGINS}.Interrupts"})) as worker:
        sizes = _record_script_calls(worker)
        record = await worker.run()

    assert record.state == "completed"
    assert [words for name, words, _ in sizes if name == "emit"] == [4]


@pytest.mark.parametrize("late_s", [4 * writer.FLUSH_S, 2 * writer.BUSY_S])
async def test_an_event_of_a_busy_process_waits_for_a_commit_for_a_limited_time(
    redis_url: str, late_s: float
) -> None:
    """Without a commit, it is stored after `MAX_FLUSH_S`, by the clock of the late loop."""
    WAITED_S.clear()
    is_busy = {"impl": f"{PLUGINS}.IsBusy", "config": {"late_s": late_s}}
    async with process(redis_url, agent(pattern=is_busy)) as worker:
        sizes = _record_script_calls(worker)
        record = await worker.run()

    assert record.state == "completed"
    assert [words for name, words, _ in sizes if name == "emit"] == [2]
    assert writer.MAX_FLUSH_S <= WAITED_S[0] <= 2 * writer.MAX_FLUSH_S


async def test_an_event_of_a_process_that_is_not_busy_does_not_wait_for_a_commit(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stored by the first timer, also if the loop is a little late."""
    monkeypatch.setattr(writer, "BUSY_S", 100.0)
    WAITED_S.clear()
    is_not_busy = {"impl": f"{PLUGINS}.IsBusy", "config": {"late_s": 0.5}}
    async with process(redis_url, agent(pattern=is_not_busy)) as worker:
        record = await worker.run()

    assert record.state == "completed"
    assert WAITED_S[0] < 2 * 0.5


async def test_large_events_are_stored_in_batches(redis_url: str) -> None:
    """A batch has a limited number of bytes, or one event."""
    async with process(redis_url, _talks(events=60, chars=100_000)) as worker:
        sizes = _record_script_calls(worker)
        record = await worker.run()

    assert record.state == "completed"
    assert max(size for name, _, size in sizes if name == "emit") <= writer.BATCH_BYTES
    assert max(size for _, _, size in sizes) <= writer.BATCH_BYTES + 10_000


@pytest.mark.parametrize(
    ("config", "outcome"),
    [
        ({"parts": 25}, "taken"),
        ({"parts": 32}, "step.too_large"),
        ({"parts": 50}, "step.too_large"),
        ({"rows": 2}, "step.too_large"),
        ({"name": "x" * 256}, "taken"),
        ({"name": "x" * 257}, "step.too_large"),
    ],
)
async def test_an_event_has_a_size_limit(redis_url: str, config: dict[str, Any], outcome: str) -> None:
    """A larger event is refused when it is emitted, with a code."""
    shouts = agent(pattern={"impl": f"{PLUGINS}.Shouts", "config": config})
    async with process(redis_url, shouts) as worker:
        record = await worker.run()

    assert record.result is not None
    assert record.result.final_output == outcome


async def test_long_replies_are_split_into_deltas(redis_url: str) -> None:
    """A delta as large as a whole reply is split. The offsets continue."""
    piece = reply_stream.ReplyStream()
    piece.add(Delta(DeltaKind.TEXT, "a" * 100_000))
    piece.add(Delta(DeltaKind.TEXT, "b" * 100_000))

    payloads = piece.take("c", 1)

    assert len(payloads) == 4
    assert all(len(payload) <= reply_stream.DELTA_CHARS + 100 for payload in payloads)
    assert [json.loads(payload)["offset"] for payload in payloads] == [0, 65_536, 131_072, 196_608]
    assert not piece.has_unsent
