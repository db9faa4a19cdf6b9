"""The outbox: every recipient is notified of every end at least once, whatever dies or fails."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.scripts import RunEnd
from openagents_worker.worker.outbox import Outbox, OutboxLimits, Recipients
from tests.support.scripts import Hand
from tests.support.waiting import await_for, wait_for

pytestmark = pytest.mark.long

TAKE: dict[str, Any] = {"limit": 10, "retry_ms": 0, "max_retry_ms": 0}


class Recipient:
    """Records the ends; raises `error` at each delivery if it is set."""

    def __init__(self, name: str, error: BaseException | None = None) -> None:
        self.name = name
        self.ends: list[RunEnd] = []
        self.error = error

    async def deliver(self, end: RunEnd) -> None:
        self.ends.append(end)
        if self.error is not None:
            raise self.error

    @property
    def run_ids(self) -> list[str]:
        return [end.run_id for end in self.ends]


def end_run(hand: Hand, run_id: str) -> None:
    hand.submit(run_id, f"s-{run_id}")
    hand.store.run(scripts.cancel(run_id=run_id, reason="", force=True))


def take(hand: Hand, recipient: str, **changed: int) -> list[RunEnd]:
    return list(hand.store.run(scripts.outbox_take(recipient=recipient, **{**TAKE, **changed})).ends)


def test_an_end_is_for_every_recipient_that_was_registered_before(hand: Hand) -> None:
    """And for none that registers later: the outbox is not a history."""
    take(hand, "one")
    take(hand, "two")
    end_run(hand, "r1")

    assert take(hand, "one") == take(hand, "two") == [RunEnd("r1", 1, 1)]
    assert take(hand, "three") == []


def test_an_end_is_due_again_until_it_is_done(hand: Hand) -> None:
    """The pause doubles. A worker that has taken it may have died."""
    take(hand, "one")
    end_run(hand, "r1")

    assert [take(hand, "one")[0].tries for _ in range(3)] == [1, 2, 3]
    assert take(hand, "one", retry_ms=60_000, max_retry_ms=60_000)[0].tries == 4
    assert take(hand, "one") == []
    assert hand.store.run(scripts.outbox_done(recipient="one", ends=["r1", "1"])) == 1
    assert hand.store.run(scripts.outbox_done(recipient="one", ends=["r1", "1"])) == 0


def test_each_life_of_a_run_has_its_own_end(hand: Hand) -> None:
    """A run that was resumed ends once more."""
    take(hand, "one")
    end_run(hand, "r1")
    hand.store.run(
        scripts.resume(
            run_id="r1", agent_id="assistant", session_id="s-r1", input_text="", checkpoint_id="", canvas=""
        )
    )
    hand.store.run(scripts.cancel(run_id="r1", reason="", force=True))

    assert [(end.run_id, end.life) for end in take(hand, "one")] == [("r1", 1), ("r1", 2)]


async def test_a_recipient_that_fails_does_not_stop_the_others(
    cell: Cell, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its end is delivered again, and given up with an error after the last try."""
    broken, ledger = Recipient("broken", ConnectionError("nobody answers")), Recipient("ledger")
    store = AsyncStore(cell)
    limits = OutboxLimits(poll_s=0.01, retry_s=0.01, max_retry_s=0.01, max_tries=3)
    outbox = Outbox(store, Recipients(all=(broken, ledger), limits=limits), leave=lambda _: None)
    await outbox.start()
    try:
        await await_for(lambda: outbox.health.report().rounds >= 2, "both recipients are registered")
        with Hand(redis_url) as hand:
            end_run(hand, "r1")
            end_run(hand, "r2")
            await await_for(lambda: "outbox.given_up" in caplog.text, "it was given up")
            await await_for(lambda: sorted(ledger.run_ids) == ["r1", "r2"], "the other was notified")
            await await_for(lambda: caplog.text.count("outbox.given_up") == 2, "both were given up")
            # The log line comes before the script that removes the entry.
            await await_for(lambda: take(hand, "broken") == take(hand, "ledger") == [], "nothing is left")
    finally:
        await outbox.aclose()
        await store.close()

    assert sorted(broken.run_ids) == ["r1"] * 3 + ["r2"] * 3
    assert outbox.health.report().last_error == "broken: ConnectionError: nobody answers"


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError(), SystemExit(3), KeyboardInterrupt(), GeneratorExit()]
)
async def test_a_recipient_that_raises_what_ends_a_task_is_served_again(
    cell: Cell, redis_url: str, error: BaseException
) -> None:
    """The code of a tool cancels its job, and may await something that was cancelled. A worker must not stop
    serving the recipient for that."""
    broken, exits = Recipient("broken", error), list[int]()
    store = AsyncStore(cell)
    limits = OutboxLimits(poll_s=0.01, retry_s=0.01, max_retry_s=0.01, max_tries=100)
    outbox = Outbox(store, Recipients(all=(broken,), limits=limits), leave=exits.append)
    await outbox.start()
    try:
        await await_for(lambda: outbox.health.report().rounds >= 1, "the recipient is registered")
        with Hand(redis_url) as hand:
            end_run(hand, "r1")
            await await_for(lambda: len(broken.ends) >= 2, "it is delivered again")
            assert type(error).__name__ in outbox.health.report().last_error
            broken.error = None
            await await_for(lambda: take(hand, "broken") == [], "nothing is left")
    finally:
        await outbox.aclose()
        await store.close()

    assert exits == []


def test_two_recipients_of_one_name_are_refused() -> None:
    """Each would get only some of the ends."""
    with pytest.raises(ValueError, match="the same name"):
        Recipients(all=(Recipient("one"), Recipient("one")))


@pytest.fixture
def processes() -> Generator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(processes: ExitStack, redis_url: str, log: Path, *, hangs: bool) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.worker.outbox_process", str(log), str(int(hangs))],
        env={**os.environ, "OPENAGENTS_REDIS_URL": redis_url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    processes.enter_context(process)
    processes.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def test_an_end_is_delivered_although_the_worker_that_delivers_it_is_killed(
    processes: ExitStack, hand: Hand, redis_url: str, tmp_path: Path
) -> None:
    """Another worker delivers it, while a second recipient fails all the time."""
    log = tmp_path / "ends"
    first = start(processes, redis_url, log, hangs=True)
    wait_for(
        lambda: hand.store.ask(lambda r: r.zcard(hand.store.keys("recipients"))) == 2, "they are registered"
    )
    end_run(hand, "r1")
    assert first.stdout is not None
    assert first.stdout.readline() == "delivering\n"

    first.kill()
    second = start(processes, redis_url, log, hangs=False)
    wait_for(lambda: log.exists() and log.read_text() == "r1 1\n", "the end was delivered")
    assert second.stdin is not None
    second.stdin.close()

    assert second.wait(60) == 0
    assert [end.run_id for end in take(hand, "broken", retry_ms=60_000)] in ([], ["r1"])
