"""Server-Sent Events: a run as a browser reads it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import openagents_worker
from openagents_worker import sse
from openagents_worker.errors import RequestInvalid, RunNotFound, TooManyWatchers
from openagents_worker.events import RunEvent
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.settings import load_settings
from openagents_worker.store.watch import awatch, watch
from tests.support.scripts import Hand
from tests.support.waiting import PATIENCE_S, await_for

PACKAGE = Path(openagents_worker.__file__).parent


def fields(frame: str) -> dict[str, str]:
    """The fields of one frame, by name; a comment has the name ''."""
    assert frame.endswith("\n\n")
    return dict(
        line.split(": ", 1) if not line.startswith(":") else ("", line) for line in frame.splitlines() if line
    )


async def all_frames(frames: AsyncGenerator[str]) -> list[dict[str, str]]:
    async with asyncio.timeout(PATIENCE_S), aclosing(frames):
        return [fields(frame) async for frame in frames]


def has_listener(hand: Hand) -> bool:
    return bool(hand.store.redis.pubsub_channels("oa:events:*"))


async def test_a_run_is_a_sequence_of_frames(hand: Hand, client: AsyncClient) -> None:
    """`id` is the event's number, `event` its name, `data` the event itself; `end` is the last one."""
    hand.finish("r1")

    frames = await all_frames(sse(client.handle("r1")))

    assert [frame.get("id") for frame in frames] == ["1", "2", "3", "4", None]
    assert [frame["event"] for frame in frames[-2:]] == ["session.run.completed", "end"]
    first = RunEvent.from_json(frames[0]["data"])
    assert (first.name, first.seq, first.run_id) == (frames[0]["event"], 1, "r1")
    assert json.loads(frames[-1]["data"]) == {"run_id": "r1"}


async def test_a_piece_of_a_reply_has_no_id(hand: Hand, client: AsyncClient) -> None:
    """A browser that reconnects sends the number of the last stored event, and gets the reply from its
    beginning."""
    async with aclosing(sse(client.handle("r1"))) as frames:
        assert [fields(await anext(frames))["id"] for _ in range(2)] == ["1", "2"]
        await await_for(lambda: has_listener(hand), "it listens")
        await asyncio.to_thread(hand.delta, "r1", "39")
        piece = fields(await anext(frames))
    again = sse(client.handle("r1"), "2")
    told_again = fields(await anext(again))
    await again.aclose()

    assert "id" not in piece
    assert json.loads(piece["data"])["payload"]["text"] == "39"
    first, again_so_far = (json.loads(each["data"])["payload"] for each in (piece, told_again))
    added = {"attempt": 1, "kind": "text"}  # the piece of this test has none
    assert again_so_far == first | added


@pytest.mark.parametrize("cut", range(1, 8))
async def test_after_a_cut_the_browser_goes_on_where_it_was(
    hand: Hand, client: AsyncClient, cut: int
) -> None:
    """`Last-Event-ID` continues without gap or double, wherever the line broke."""
    hand.emit("r1", "llm.called", "llm.succeeded", "tool.called")
    before: list[dict[str, str]] = []
    async with aclosing(sse(client.handle("r1"))) as frames:
        while len(before) < min(cut, 5):
            before.append(fields(await anext(frames)))
    hand.finish("r1")

    after = await all_frames(sse(client.handle("r1"), before[-1]["id"]))

    assert [frame.get("id") for frame in [*before, *after]] == [*map(str, range(1, 8)), None]


async def test_after_the_end_there_is_only_the_end(hand: Hand, client: AsyncClient) -> None:
    """A browser that lost its connection after the last event gets the end frame."""
    hand.finish("r1")

    assert [frame["event"] for frame in await all_frames(sse(client.handle("r1"), "4"))] == ["end"]


async def test_silence_is_filled_with_comments(hand: Hand, client: AsyncClient) -> None:
    """A proxy sees that the line is alive; a browser ignores them; no event is lost between them."""
    seen: list[dict[str, str]] = []
    async with asyncio.timeout(PATIENCE_S), aclosing(sse(client.handle("r1"), heartbeat_s=0.02)) as frames:
        async for frame in frames:
            seen.append(fields(frame))
            if len(seen) == 5:
                await asyncio.to_thread(hand.finish, "r1")

    assert {"": ": alive"} in seen
    assert [frame["id"] for frame in seen if "id" in frame] == ["1", "2", "3", "4"]


async def test_a_slow_browser_delays_nobody_and_loses_nothing(hand: Hand, client: AsyncClient) -> None:
    """The frames that wait for it are few; the other events it gets later, from the stream."""
    slow, fast = sse(client.handle("r1")), sse(client.handle("r1"))
    seen = [fields(await anext(slow))]
    reading = asyncio.create_task(all_frames(fast), name="fast browser")
    for _ in range(3):
        await asyncio.to_thread(hand.emit, "r1", *["tool.called"] * 200)
    await asyncio.to_thread(hand.finish, "r1")

    everything = [*map(str, range(1, 605)), None]
    assert [frame.get("id") for frame in await reading] == everything
    seen += await all_frames(slow)
    assert [frame.get("id") for frame in seen] == everything


async def test_frames_end_when_their_task_is_cancelled(hand: Hand, client: AsyncClient) -> None:
    """A server that stops cancels all tasks. The browser must not wait for events that nobody reads."""
    frames = sse(client.handle("r1"), heartbeat_s=0.02)
    await anext(frames)
    for task in asyncio.all_tasks():
        if task.get_name() == "sse r1":
            task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await all_frames(frames)


async def test_a_browser_that_goes_away_leaves_nothing(hand: Hand, client: AsyncClient) -> None:
    """Whether the server closes the generator or cancels who reads it."""
    frames = sse(client.handle("r1"))
    await anext(frames)
    await frames.aclose()
    await await_for(lambda: not has_listener(hand), "the subscription is gone")

    reading = asyncio.create_task(all_frames(sse(client.handle("r1"))), name="reader")
    await await_for(lambda: has_listener(hand), "it listens")
    reading.cancel()
    await asyncio.wait([reading])

    await await_for(lambda: not has_listener(hand), "the subscription is gone")
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("sse")] == []


async def test_a_name_cannot_break_out_of_its_line(hand: Hand, client: AsyncClient) -> None:
    """Tools name events of their own; one with a line end in it does not forge a field."""
    hand.emit("r1", "mine\nid: 999\ndata: {}")
    hand.finish("r1")

    frames = await all_frames(sse(client.handle("r1")))

    assert frames[2]["event"] == "mine id: 999 data: {}"
    assert frames[2]["id"] == "3"


@pytest.mark.parametrize("wrong", ["abc", "-1", "1.5", "²", "1 2"])
async def test_an_id_that_is_none_of_ours_is_refused_at_once(client: AsyncClient, wrong: str) -> None:
    """Before the first byte of the answer is out; its error has the status 422."""
    with pytest.raises(RequestInvalid, match="Last-Event-ID") as raised:
        sse(client.handle("r1"), wrong)
    assert raised.value.http_status == 422


async def test_an_unknown_run_is_not_found(hand: Hand, client: AsyncClient) -> None:
    """With the first frame."""
    with pytest.raises(RunNotFound):
        await all_frames(sse(client.handle("r9")))


async def test_the_handle_that_delay_gives_will_do(hand: Hand, redis_url: str) -> None:
    """Submitted by sync code, streamed by an async server."""
    hand.finish("r1")
    with Client(settings=load_settings({"OPENAGENTS_REDIS_URL": redis_url})) as client:
        handle: Any = client.handle("r1")

        assert len(await all_frames(sse(handle))) == 5


async def test_every_way_to_follow_a_run_is_one_watcher_more(hand: Hand, redis_url: str) -> None:
    """Events of both kinds of handle, the store's own two doors and pages are counted together; whoever
    waits for the end is not, and is not refused."""
    one = {"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_WATCHERS": "1"}
    few = load_settings(one)
    async with AsyncClient(settings=few) as client:
        sync = Client(settings=few)
        handle: Any = sync.handle("r1")

        def ways() -> list[Any]:
            return [
                sse(client.handle("r1")),
                sse(handle),
                client.handle("r1").events(),
                client.handle("r1").aevents(),
                handle.aevents(),
                awatch(client.store, "r1"),
                watch(sync.store, "r1"),
            ]

        for holder in range(len(ways())):
            others = ways()
            holding = others.pop(holder)
            await _first_of(holding)
            for other in others:
                with pytest.raises(TooManyWatchers):
                    await _first_of(other)
            with pytest.raises(TooManyWatchers):
                sse(handle)
            await _close(holding)

        following = client.handle("r1").events()
        await anext(following)
        waiting = asyncio.create_task(client.handle("r1").wait())
        await asyncio.to_thread(hand.finish, "r1")
        assert (await waiting).run_id == "r1"
        await following.aclose()
        await asyncio.to_thread(sync.close)


def test_nobody_else_follows_events() -> None:
    """The command line, the product's pages and Flower's read events by `handle.events` or `sse` only."""
    follows = re.compile(r"(?<![\w.])(?:a?watch|_?listening|subscribed_inbox)\((?!self|\n)")
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if follows.search(re.sub(r"def \w+\(", "", path.read_text("utf-8")))
    }

    assert found == {"producer/handle.py", "store/watch.py"}


async def _first_of(watcher: Any) -> Any:
    if hasattr(watcher, "__anext__"):
        return await anext(watcher)
    return await asyncio.to_thread(next, watcher)


async def _close(watcher: Any) -> None:
    if hasattr(watcher, "aclose"):
        await watcher.aclose()
    else:
        await asyncio.to_thread(watcher.close)


async def test_so_many_watch_at_once_and_no_more(hand: Hand, redis_url: str) -> None:
    """The next one is rejected at once, with a code and a status. When one has ended, another is accepted."""
    few = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_WATCHERS": "2"})
    async with AsyncClient(settings=few) as client:
        never_begun, late = sse(client.handle("r1")), sse(client.handle("r1"))
        watchers = [sse(client.handle("r1")) for _ in range(2)]
        for watcher in watchers:
            await anext(watcher)

        with pytest.raises(TooManyWatchers, match="2 open watchers") as refused:
            sse(client.handle("r1"))
        with pytest.raises(TooManyWatchers):
            await anext(late)
        await watchers.pop().aclose()
        third = sse(client.handle("r1"))
        await anext(third)

        for watcher in (never_begun, late, third, *watchers):
            await watcher.aclose()
    assert "OPENAGENTS_MAX_WATCHERS" in str(refused.value)
    assert (refused.value.code, refused.value.http_status, refused.value.retryable) == (
        "watch.too_many",
        503,
        True,
    )
