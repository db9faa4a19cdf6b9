"""A streamed reply: every new watcher gets all of it, also after the death of a worker."""

from __future__ import annotations

import json
import threading
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

from openagents_worker.producer.handle import RunHandle
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.scripts import WriteAnswer
from openagents_worker.store.watch import awatch, watch
from tests.support.deployment import agent, installed
from tests.support.scripts import Hand
from tests.support.waiting import wait_for
from tests.web.reading import Screen

KEPT_BYTES = 64 * 1024


class Speaker:
    """Says a reply of the run r1 piece by piece."""

    def __init__(self, hand: Hand, call: str = "0.1", name: str = "llm.delta") -> None:
        self._hand, self._call, self._said, self._name = hand, call, 0, name

    def say(self, text: str) -> None:
        field = "call" if self._name == "llm.delta" else "call_id"
        payload = json.dumps({field: self._call, "offset": self._said, "text": text}, ensure_ascii=False)
        self._hand.emit("r1", self._name, payload=payload)
        self._said += len(text)


def first_piece(hand: Hand) -> dict[str, Any] | None:
    """The part of the reply that a new watcher gets first; None without a part."""
    hand.emit("r1", "mark")
    with closing(watch(hand.store, "r1", int(hand.store.redis.hget("oa:run:r1", "seq") or 0) - 1)) as events:
        assert next(events).name == "mark"
        hand.emit("r1", "mark")
        event = next(events)
    return dict(event.payload) if event.name == "llm.delta" else None


async def test_who_joins_in_the_middle_gets_what_was_said_as_one_piece(hand: Hand, store: AsyncStore) -> None:
    """It follows the stored events, with offset 0, and the next pieces continue it, in any language."""
    speaker, screen = Speaker(hand), Screen()
    for text in ("Grüße ", "aus 東京 ", "🗼"):
        speaker.say(text)

    async with aclosing(awatch(store, "r1")) as events:
        before = [await anext(events) for _ in range(3)]
        speaker.say(", bis ")
        speaker.say("bald!")
        for event in [*before, await anext(events), await anext(events)]:
            screen.show(event)

    assert [event.name for event in before] == ["run.queued", "run.attempt_started", "llm.delta"]
    assert before[2].seq is None
    so_far = {"call": "0.1", "attempt": 1, "offset": 0, "text": "Grüße aus 東京 🗼", "kind": "text"}
    assert before[2].payload == so_far
    assert screen.texts == {"0.1": "Grüße aus 東京 🗼, bis bald!"}


def joined(hand: Hand) -> dict[str, str]:
    """What a new watcher gets of the texts that are streaming, by the names of the events."""
    hand.emit("r1", "mark")
    texts: dict[str, str] = {}
    with closing(watch(hand.store, "r1", int(hand.store.redis.hget("oa:run:r1", "seq") or 0) - 1)) as events:
        assert next(events).name == "mark"
        hand.emit("r1", "mark")
        while (event := next(events)).name != "mark":
            assert (event.seq, event.payload["offset"]) == (None, 0)
            texts[event.name] = str(event.payload["text"])
    return texts


def test_the_output_of_a_tool_is_kept_beside_a_reply(hand: Hand) -> None:
    """A tool may call the model, and two calls may run side by side: each text ends with its own event."""
    output, reply = Speaker(hand, "t:1", "tool.delta"), Speaker(hand)
    output.say("row 1\n")
    assert joined(hand) == {"tool.delta": "row 1\n"}
    reply.say("I see")
    output.say("row 2\n")
    assert joined(hand) == {"llm.delta": "I see", "tool.delta": "row 1\nrow 2\n"}

    hand.emit("r1", "llm.succeeded", payload='{"model":"m","call":"0.1"}')
    assert joined(hand) == {"tool.delta": "row 1\nrow 2\n"}
    reply = Speaker(hand, "0.2")
    reply.say("Now")
    ended = '{"tool_id":"t","result":1,"call_id":"t:1","streamed":true}'
    hand.emit("r1", "tool.succeeded", payload=ended)
    assert joined(hand) == {"llm.delta": "Now"}
    hand.emit("r1", "llm.failed", payload='{"model":"m","call":"0.2"}')
    assert hand.store.redis.exists("oa:run:r1:reply") == 0


def test_the_output_of_a_tool_that_failed_is_dropped(hand: Hand) -> None:
    Speaker(hand, "t:1", "tool.delta").say("row 1")
    hand.emit("r1", "tool.failed", payload='{"tool_id":"t","error":"e","call_id":"t:2","streamed":true}')
    hand.emit("r1", "tool.failed", payload='{"tool_id":"t","error":"e","call_id":"t:1","streamed":true}')
    assert hand.store.redis.exists("oa:run:r1:reply") == 0


def test_a_reply_that_is_over_is_not_told_again(hand: Hand) -> None:
    """Its commit has the whole text, and deletes the key with the pieces."""
    Speaker(hand).say("391")
    assert first_piece(hand) is not None

    hand.emit("r1", "llm.succeeded", payload='{"model":"m","call":"0.1","output_text":"391"}')

    assert first_piece(hand) is None
    assert hand.store.redis.exists("oa:run:r1:reply") == 0


def test_the_end_of_another_call_leaves_the_reply_alone(hand: Hand) -> None:
    """Calls may run side by side."""
    Speaker(hand, "0.2").say("still ")

    hand.emit("r1", "llm.succeeded", payload='{"model":"m","call":"0.1"}')

    assert (first_piece(hand) or {})["text"] == "still "


def test_another_attempt_begins_again(hand: Hand) -> None:
    """The pieces of an attempt that died do not mix with those of the next one."""
    Speaker(hand).say("This is what the first wor")
    hand.retry("r1", delay_ms=0)
    hand.claim("r1")

    speaker = Speaker(hand)
    speaker.say("Now ")
    speaker.say("the second")

    second = {"call": "0.1", "attempt": 2, "offset": 0, "text": "Now the second", "kind": "text"}
    assert first_piece(hand) == second


def test_what_is_kept_of_a_reply_is_bounded(hand: Hand) -> None:
    """The beginning of a very long reply is stored for a minute after its last piece."""
    speaker = Speaker(hand)
    for _ in range(100):
        speaker.say("x" * 1000)

    kept = (first_piece(hand) or {})["text"]
    assert KEPT_BYTES - 1000 < len(kept) <= KEPT_BYTES
    assert hand.store.redis.memory_usage("oa:run:r1:reply") < 2 * KEPT_BYTES
    assert 0 < hand.store.redis.pttl("oa:run:r1:reply") <= 60_000


def test_a_worker_that_has_lost_the_run_says_nothing(hand: Hand) -> None:
    """A piece is a fenced write like any other."""
    piece = ["llm.delta", '{"call":"0.1","offset":0,"text":"no"}']
    door = scripts.emit(run_id="r1", fence="1:somebody", batch_no=99, events=piece)

    assert hand.store.run(door) is WriteAnswer.FENCED
    assert hand.store.redis.exists("oa:run:r1:reply") == 0


# --- real workers ----------------------------------------------------------------------------------------


class Viewer(threading.Thread):
    """Looks at a run from now until its end."""

    def __init__(self, handle: RunHandle[Any]) -> None:
        super().__init__(daemon=True)
        self.screen, self._handle = Screen(), handle
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            for event in self._handle.events():
                self.screen.show(event)
        except BaseException as error:
            self.error = error

    def text(self) -> str:
        """The reply of the one call, as it stood there at the end."""
        self.join(30)
        assert not self.is_alive(), "the run did not end"
        assert self.error is None
        (text,) = self.screen.texts.values()
        return text

    @property
    def shown(self) -> int:
        return sum(map(len, self.screen.texts.values()))


def test_a_reply_cut_by_the_death_of_its_worker_is_shown_whole(tmp_path: Path) -> None:
    """Viewers that were there from the start, joined before the kill or after it end with the same text."""
    with installed(tmp_path, agent("talker")) as installation:
        workers = [installation.worker, installation.stack.start_worker("second")]
        installation.model.will_say({"text": " ".join(f"word-{number}" for number in range(1200))})
        all_watch = threading.Event()  # half of each reply is held back until then
        installation.model.may_go_on = lambda piece: piece < 600 or all_watch.is_set()
        handle = installation.submit("talker")
        early = Viewer(handle)
        wait_for(lambda: early.shown > 300, "the reply streams")
        middle = Viewer(handle)
        wait_for(lambda: middle.shown > 300, "who joins in the middle has the beginning, too")

        run_host = str(early.screen.pieces[-1].worker)
        next(worker for worker in workers if run_host.startswith(f"{worker.name}@")).kill()
        wait_for(lambda: early.screen.pieces[-1].attempt == 2, "another worker says it again")
        late = Viewer(handle)
        wait_for(lambda: late.shown, "who joins now has the beginning of the second one")
        all_watch.set()

        reply = handle.wait(timeout=60).final_output
        assert [early.text(), middle.text(), late.text()] == [reply] * 3
        assert [viewer.screen.pieces[0].payload["offset"] for viewer in (early, middle, late)] == [0, 0, 0]
        assert {piece.attempt for piece in middle.screen.pieces} == {1, 2}
