"""Notices: what a worker does with a request, by its kind; a request that it does not know stops nothing."""

from __future__ import annotations

import json
import logging

import pytest

from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.notice import (
    CANCEL,
    FACT,
    MAX_NOTICE_CHARS,
    Notice,
    NoticeUnreadable,
    parse_notice,
)
from openagents_worker.worker.control_channel import ControlChannel
from openagents_worker.worker.notice_handlers import NoticeHandlers, confirm_in_redis
from tests.support.scripts import Hand
from tests.support.waiting import await_for

STEER = Notice("steer", "r1", {"text": "be brief"})


class Handled:
    """Handlers for `cancel` and `steer` that record the notices, and a confirm function that records them."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self.confirmed: list[str] = []
        table = {CANCEL: self.notices.append, "steer": self.notices.append, "broken": self._fail}
        self.handle = NoticeHandlers(table, confirm=self.confirmed.append).handle

    def _fail(self, notice: Notice) -> None:
        raise ZeroDivisionError("a bug")


@pytest.fixture
def handled() -> Handled:
    return Handled()


def test_a_cancel_request_is_the_id_of_its_run() -> None:
    """Workers of the previous version read this form, and no other."""
    assert Notice(CANCEL, "r1").text == "r1"
    assert parse_notice("r1") == Notice(CANCEL, "r1")


@pytest.mark.parametrize("run_id", [STEER.text.strip(), '{"kind":"steer","run":"r1"}', "{}", "[1]"])
def test_no_run_id_is_taken_for_another_request(run_id: str) -> None:
    """A producer chooses the id of its run, and anybody may cancel it."""
    assert parse_notice(run_id) == Notice(CANCEL, run_id)


def test_a_notice_with_fields_is_read_as_it_was_written() -> None:
    """The text of any other kind begins with a space, which no id contains."""
    assert STEER.text[0] == " "
    assert parse_notice(STEER.text) == STEER


@pytest.mark.parametrize(
    "text",
    [
        " ",
        " no",
        " [1]",
        ' {"run":"r1"}',
        ' {"kind":""}',
        ' {"kind":1}',
        ' {"kind":"steer","run":1}',
        " " + json.dumps({"kind": "k" * 65}),
        " " + "[" * 10_000,
        "r" * (MAX_NOTICE_CHARS + 1),
    ],
)
def test_a_notice_that_cannot_be_read_is_refused(
    handled: Handled, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, with a code and cut, and taken out of the box."""
    caplog.set_level(logging.WARNING, "openagents_worker")
    with pytest.raises(NoticeUnreadable):
        parse_notice(text)

    handled.handle(text)
    handled.handle(text)

    assert handled.notices == []
    assert handled.confirmed == [text, text]
    assert caplog.text.count("control.invalid") == 1
    assert len(caplog.records[0].getMessage()) < 1_000


def test_an_unknown_kind_stops_nothing(handled: Handled, caplog: pytest.LogCaptureFixture) -> None:
    """A newer version may have sent it."""
    caplog.set_level(logging.WARNING, "openagents_worker")

    for text in (Notice("dance", "r1").text, "r2", STEER.text):
        handled.handle(text)

    assert handled.notices == [Notice(CANCEL, "r2"), STEER]
    assert caplog.text.count("control.unknown_kind") == 1


def test_a_handler_that_fails_stops_nothing(handled: Handled, caplog: pytest.LogCaptureFixture) -> None:
    """The next notice is handled."""
    handled.handle(Notice("broken", "r1").text)
    handled.handle("r2")

    assert handled.notices == [Notice(CANCEL, "r2")]
    assert "control.failed" in caplog.text


def test_a_notice_is_handled_once_and_a_cancel_request_each_time(handled: Handled) -> None:
    """A notice comes over the channel and from the box. The box keeps a cancel request until its run ends."""
    for text in (STEER.text, STEER.text, "r1", "r1"):
        handled.handle(text)

    assert handled.notices == [STEER, Notice(CANCEL, "r1"), Notice(CANCEL, "r1")]
    assert handled.confirmed == [STEER.text, STEER.text]


def test_a_notice_of_a_fact_is_handled_each_time(cell: Cell, redis_url: str) -> None:
    """After a run is deleted, its id may be used again. The notice of the first fact of the new run has the
    text of an earlier one, and must reach the worker that has handled that."""
    numbers: list[object] = []
    confirmed: list[str] = []
    table = {FACT: lambda notice: numbers.append(notice.fields["number"])}
    handle = NoticeHandlers(table, confirm=confirmed.append).handle
    with Hand(redis_url) as hand:
        for _ in range(2):
            hand.submit("r1")
            hand.claim("r1")
            fact = scripts.fact(
                run_id="r1", name="steer:", value="1", message_id="", max_facts=10, max_bytes=1_000
            )
            hand.store.run(fact)
            [text] = hand.store.run(scripts.renew(incarnation=hand.incarnation, lease_ms=60_000)).notices
            handle(text)
            hand.store.run(scripts.confirm_notices(incarnation=hand.incarnation, notices=confirmed[-1:]))
            hand.finish("r1")
            delete = scripts.delete_session(session_id="s1", limit=10, even_if_not_notified=True)
            assert hand.store.run(delete).answer == "DELETED"

    assert (numbers, len(confirmed)) == ([1, 1], 2)


async def test_a_notice_reaches_a_worker_and_leaves_its_box(cell: Cell, redis_url: str) -> None:
    """Over the channel at once; the box holds it until the worker has handled it."""
    received: list[Notice] = []
    store = AsyncStore(cell)
    with Hand(redis_url) as hand:
        confirm = confirm_in_redis(store, lambda: hand.incarnation, leave=lambda _: None)
        channel = ControlChannel(
            cell, on_notice=NoticeHandlers({"steer": received.append}, confirm=confirm).handle
        )
        try:
            channel.follow(hand.incarnation)
            await channel.wait_until_listening()

            sent = await store.run(scripts.notify(incarnation=hand.incarnation, notice=STEER.text))

            async def box_is_empty() -> bool:
                renewal = await store.run(scripts.renew(incarnation=hand.incarnation, lease_ms=60_000))
                return received == [STEER] and not renewal.notices

            assert sent == "OK"
            await await_for(box_is_empty, "the notice was handled")
        finally:
            await channel.aclose()
            await store.close()


async def test_a_notice_stays_in_the_box_until_it_is_handled(cell: Cell, redis_url: str) -> None:
    """The next heartbeat brings a notice that the channel has missed. A worker that is gone gets none."""
    store = AsyncStore(cell)
    with Hand(redis_url) as hand:
        await store.run(scripts.notify(incarnation=hand.incarnation, notice=STEER.text))
        renewal = await store.run(scripts.renew(incarnation=hand.incarnation, lease_ms=60_000))
        taken = await store.run(
            scripts.confirm_notices(incarnation=hand.incarnation, notices=[STEER.text, "x"])
        )
        gone = await store.run(scripts.notify(incarnation="nobody:1", notice=STEER.text))
    await store.close()

    assert renewal.notices == {STEER.text}
    assert (taken, gone) == (1, "GONE")
