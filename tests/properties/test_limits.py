"""Limits of the fleet under all faults, and that every guard of their scripts is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from importlib import resources
from typing import Any

import pytest

from tests.properties.lab import Lab
from tests.properties.limits import LimitedProtocol
from tests.properties.machine import BATCH, Protocol, play, protocol_in

EXAMPLES = int(os.environ.get("OPENAGENTS_TEST_EXAMPLES", "20"))  # thousands for a long hunt
SEEDS = 8

GUARDS = {
    "only the owner of a run reserves": (
        "if state ~= STATE.running or owner_fence ~= fence then return reply{answer = 'FENCED'} end",
        "",
    ),
    "a repeated request is reserved once": (
        "if reserved then return reply{answer = 'OK'",
        "if false then return reply{answer = 'OK'",
    ),
    "concurrent requests are limited": (
        "local is_full = limit.max_concurrency > 0 and",
        "local is_full = false and",
    ),
    "requests per minute are limited": (
        "at = math.max(at, limit.next_us - BURST_US)",
        "at = math.max(at, 0)",
    ),
    "the share of an attempt that has ended comes back": (
        "    if not holds(oldest[i]) then",
        "      if false then",
    ),
    "without a limit of concurrent requests, those of attempts that have ended are not in use": (
        "  if limit.max_concurrency == 0 then forget_ended(limit) end",
        "",
    ),
    "the share of an attempt that owns its run is kept": (
        "return state == STATE.running and fence == F",
        "return state == STATE.running and fence ~= F",
    ),
    "a run that continues on another worker does not keep the share of the first one": (
        "return state == STATE.running and fence == F",
        "return state == STATE.running",
    ),
    "a new request does not get ahead of runs that wait": ("if is_full or others > 0 or", "if is_full or"),
    "time that is not used is not lost": ("if is_idle(limit) then others, delay_ms = 0, 0 end", ""),
    "a new request does not take the room of runs that were called": ("  called = expected(limit)\n", ""),
    "a run that was called does not wait for others": ("if was_called then", "if false then"),
    "a request that has ended is not settled twice": ("  redis.call('ZREM', k.limit_calls(name), id)\n", ""),
    "a pause holds for all": (
        "local at = math.max(NOW_US, limit.blocked_until_ms * 1000)",
        "local at = NOW_US",
    ),
    "no more runs are called than there is room for": ("return count - expected(limit)", "return count"),
    "a run that is called leaves the queue": (
        "    redis.call('ZREM', k.limit_queue(limit.name), R)\n",
        "",
    ),
    "only a run that is parked there is called": (
        "if is_parked_at(limit.name, run) then",
        "if run then",
    ),
    "a run that waits keeps its place": ("elseif not redis.call('ZSCORE', queue, R) then", "else"),
    "a run that was called in vain gets the first place": (
        "if redis.call('ZREM', k.limit_called(name), R) == 1 then",
        "if false then",
    ),
    "tenants take turns": ("digits(place), R)", "digits(NOW_MS), R)"),
    "a run that is served leaves the queue": (
        "redis.call('ZREM', k.limit_queue(name), run_id)\n",
        "",
    ),
    "a run that is served is not expected any more": (
        "redis.call('ZREM', k.limit_called(name), run_id)\n",
        "",
    ),
    "a run that is parked when there is room is called at once": (
        "  wakes = serve(limit_of(limit))\n",
        "",
    ),
    "a queue that nobody serves is checked again": (
        "    redis.call('ZADD', k.limits(), digits(NOW_MS + LOOK_AGAIN_MS), limit.name)\n",
        "",
    ),
}


def a_run_waits_and_asks_again(m: LimitedProtocol) -> None:
    """It is woken because its wait is over."""
    one_run_asks_and_the_other_one_waits(m)
    m.let_pass(2)
    m.wake(100, lost=False)
    m.deliver(NEW, 0, doubled=False, way="answered")
    m.wait_for_limit(0, 1, "c", "answered")


def a_run_asks_again_after_the_death_of_its_worker(m: LimitedProtocol) -> None:
    """The other one still waits."""
    one_run_asks_and_the_other_one_waits(m)
    m.die_at_work(0, lost=False, blameless=False)
    m.deliver(NEW, 0, doubled=False, way="answered")
    m.ask(0, 0, "c", may_park=True, way="answered")


def a_run_that_waited_is_served_before_it_is_called(m: LimitedProtocol) -> None:
    """Its wait is over, and nobody has served the limit since there is room."""
    one_run_asks_and_the_other_one_waits(m, "r")
    m.let_pass(2)
    Protocol.wake(m, 100, lost=False)
    m.deliver(NEW, 0, doubled=False, way="answered")
    m.ask(0, 1, "r", may_park=True, way="answered")


def a_run_that_waited_continues_when_the_request_of_the_other_one_ends(m: LimitedProtocol) -> None:
    """It was woken because its wait is over, so it must not be called."""
    one_run_asks_and_the_other_one_waits(m)
    m.let_pass(2)
    m.wake(100, lost=False)
    m.deliver(NEW, 0, doubled=False, way="answered")
    m.settle(0, 0, way="answered")


def a_run_asks_again_after_it_has_made_room(m: LimitedProtocol) -> None:
    """The other one was called, and is on its way."""
    one_run_asks_and_the_other_one_waits(m)
    m.settle(0, 0, way="answered")
    m.ask(0, 0, "c", may_park=True, way="answered")


def a_run_waits_after_it_has_made_room(m: LimitedProtocol) -> None:
    """The other one was called, and asks while the first one waits."""
    one_run_asks_and_the_other_one_waits(m)
    m.settle(0, 0, way="answered")
    m.wait_for_limit(0, 0, "c", "answered")
    m.deliver(NEW, 0, doubled=False, way="answered")
    m.ask(0, 0, "c", may_park=True, way="answered")


def one_run_asks_and_the_other_one_waits(m: LimitedProtocol, name: str = "c") -> None:
    for session in ("s", "t"):
        m.submit(session, 0, durable=True, expires=0, tell=False, busy="", lost=False)
        m.deliver(NEW, 0, doubled=False, way="answered")
    m.ask(0, 0, name, may_park=True, way="answered")
    m.wait_for_limit(0, 1, name, "answered")


NEW = 2  # the worker that can park runs
STORIES: dict[str, Callable[[LimitedProtocol], None]] = {
    "a run that waits keeps its place": a_run_waits_and_asks_again,
    "only a run that is parked there is called": (
        a_run_that_waited_continues_when_the_request_of_the_other_one_ends
    ),
    "a new request does not take the room of runs that were called": a_run_asks_again_after_it_has_made_room,
    "no more runs are called than there is room for": a_run_waits_after_it_has_made_room,
    "a run that was called does not wait for others": a_run_waits_after_it_has_made_room,
    "a run that is served leaves the queue": a_run_that_waited_is_served_before_it_is_called,
    "a new request does not get ahead of runs that wait": a_run_asks_again_after_the_death_of_its_worker,
}
"""Histories that random ones rarely produce, by the guard that they need."""


def tell(lab: Lab, story: Callable[[LimitedProtocol], None]) -> None:
    machine: Any = protocol_in(lab, LimitedProtocol)()
    machine.holds()
    story(machine)
    machine.holds()
    machine.teardown()


@pytest.fixture
def lab(redis_url: str) -> Generator[Lab]:
    lab = Lab(redis_url)
    yield lab
    lab.close()


@pytest.mark.share(of=2)
@pytest.mark.parametrize("seed", range(EXAMPLES // BATCH))
def test_whatever_happens_limits_hold_and_every_run_ends(lab: Lab, seed: int) -> None:
    """Lost, duplicate and late messages, answers and requests; deaths; a Redis that loses a second."""
    play(lab, seed, LimitedProtocol)


@pytest.mark.parametrize("guard", STORIES)
def test_with_every_guard_the_story_ends_well(lab: Lab, guard: str) -> None:
    tell(lab, STORIES[guard])


@pytest.mark.slow
@pytest.mark.parametrize("guard", GUARDS)
def test_without_a_guard_a_promise_is_broken(redis_url: str, guard: str) -> None:
    """Its story, or one of many random histories, shows the purpose of the guard."""
    broken = Lab(redis_url, (GUARDS[guard],))
    try:
        with pytest.raises(AssertionError):
            _show(broken, guard)
    finally:
        broken.clear()
        broken.close()


def _show(lab: Lab, guard: str) -> None:
    if guard in STORIES:
        tell(lab, STORIES[guard])
    for seed in range(SEEDS):
        play(lab, seed, LimitedProtocol)


def test_every_guard_stands_in_a_script() -> None:
    lua = resources.files("openagents_worker.store").joinpath("lua")
    files = [*lua.iterdir(), *lua.joinpath("lib").iterdir()]
    everything = "\n".join(file.read_text("utf-8") for file in files if file.name.endswith(".lua"))

    assert [old for old, _ in GUARDS.values() if old not in everything] == []
