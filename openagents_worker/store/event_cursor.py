"""Event cursors: the only place that decides which event of a run a watcher gets next, without I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count, takewhile

from openagents_worker.arguments import number_of
from openagents_worker.errors import RecordUnreadable
from openagents_worker.events import RunEvent
from openagents_worker.jsontext import LARGEST_COUNT, loads
from openagents_worker.models import RunState
from openagents_worker.store.codec import PLAIN, PayloadCodec
from openagents_worker.store.formats import PARSE_ERRORS, WRITTEN, stored_format, translate_parse_errors
from openagents_worker.store.paging import PageSize
from openagents_worker.store.published import PublishedMessage

__all__ = [
    "HEAD_FIELDS",
    "MAX_PAGE_EVENTS",
    "Entry",
    "EventCursor",
    "RunHead",
    "bytes_of",
    "event_or_none",
    "first_page_size",
    "parse_head",
    "stored_event",
]

FIRST_PAGE = 100
MAX_PAGE_EVENTS = 500

Entry = tuple[str, Mapping[str, str]]  # a stream entry: id ({seq}-0) and fields, see `stored_event`
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class RunHead:
    """The fields of a run record that a watcher needs. `seq` is the number of the newest event."""

    run_id: str
    state: RunState
    seq: int
    life: int
    agent_id: str
    session_id: str


HEAD_FIELDS = ("state", "seq", "life", "agent", "session", "format")


def parse_head(run_id: str, values: Sequence[str | None]) -> RunHead | None:
    state, seq, life, agent_id, session_id, format_ = values
    if state is None:
        return None  # the scripts ignore such a record, too
    with translate_parse_errors(stored_format(format_), run_id=run_id):
        return RunHead(
            run_id, RunState(state), _last_number(seq), int(life or 1), agent_id or "", session_id or ""
        )


def _last_number(seq: str | None) -> int:
    """Parse the number of the newest event. Raises `ValueError` if it cannot be the id of a stream entry."""
    count = int(seq or 0)
    if not 0 <= count <= LARGEST_COUNT:
        raise ValueError("seq is not the number of an event")
    return count


def stored_event(head: RunHead, entry: Entry, codec: PayloadCodec = PLAIN) -> RunEvent:
    """Parse a stored event. The fields that all events of the run share come from `head`.

    Raises `RecordUnreadable`.
    """
    with translate_parse_errors(WRITTEN, run_id=head.run_id):
        return _stored_event(head, *entry, codec)


def _stored_event(head: RunHead, id_: str, fields: Mapping[str, str], codec: PayloadCodec) -> RunEvent:
    return RunEvent(
        name=fields["name"],
        seq=int(id_.partition("-")[0]),
        run_id=head.run_id,
        session_id=head.session_id,
        agent_id=head.agent_id,
        life=int(fields["life"]),
        attempt=int(fields["attempt"]),
        worker=fields["worker"] or None,
        timestamp=EPOCH + timedelta(milliseconds=int(fields["at"])),
        payload=loads(codec.decode(fields["payload"])),
        final=fields["final"] == "1",
    )


def event_or_none(head: RunHead, entry: Entry, codec: PayloadCodec) -> RunEvent | None:
    """The event, or None if the library did not write this entry. It must not hide the other events."""
    try:
        return stored_event(head, entry, codec)
    except RecordUnreadable:
        return None


def first_page_size() -> PageSize:
    return PageSize(first=FIRST_PAGE, max_count=MAX_PAGE_EVENTS)


def bytes_of(page: Sequence[Entry]) -> int:
    return sum(len(fields.get("payload", "")) for _, fields in page)


class EventCursor:
    """The position of one watcher in the events of a run, without I/O.

    `after` is the number of the last event that the watcher has seen; None: it wants only events from now on.
    The caller passes the head of the run (`set_head`), pages of the stream while `is_behind` is True
    (`replay`), and else the live messages (`live`), until `is_over` is True: after the final event of the
    life in which the watcher joined, or when this event can no longer arrive.
    """

    def __init__(self, after: int | None = 0, codec: PayloadCodec = PLAIN) -> None:
        self.is_behind = True
        self._codec = codec
        self.is_over = False
        self.page_size = first_page_size()
        self._wants_stored = after is not None
        self._next_seq = None if after is None else number_of("after", after) + 1
        self._read_head: RunHead | None = None
        self._life: int | None = None
        self._ends_with_replay = False
        self._first_skipped: int | None = None  # number of the first unreadable event before `next_seq`
        self._replayed_until: datetime | None = None  # time of the last replayed event or reply text

    @property
    def next_seq(self) -> int:
        """The number of the next event to return."""
        return self._next_seq or 1

    def set_head(self, head: RunHead) -> None:
        """Set the head of the run, up to which the stream must be read."""
        self._read_head = head
        self._life = head.life if self._life is None else self._life
        self._next_seq = head.seq + 1 if self._next_seq is None else self._next_seq
        self._ends_with_replay = head.state.is_terminal or head.life > self._life
        self.is_behind = True

    def replay(self, page: Sequence[Entry], reply: Mapping[str, str] | None = None) -> Iterator[RunEvent]:
        """The events of a page of the stream, read from `next_seq` on, and the texts that are streaming."""
        head = self._read_head
        assert head is not None, "call set_head first"
        has_ended_since = False
        for id_, fields in page:
            if self.is_over or int(id_.partition("-")[0]) < self.next_seq:
                continue
            event = event_or_none(head, (id_, fields), self._codec)
            if event is None:
                self._skip_unreadable(int(id_.partition("-")[0]))
                continue
            yield from self._gap_before(event)
            self._replayed_until = event.timestamp
            has_ended_since = event.final and self.next_seq > head.seq
            yield self._mark_seen(event)
        requested = self.page_size.count
        self.page_size.learn(len(page), bytes_of(page))
        if len(page) < requested:
            self.is_over = self.is_over or self._ends_with_replay
            self.is_behind = has_ended_since and not self.is_over  # the record may have changed meanwhile
            if reply and self._wants_stored and not self.is_over:
                yield from self._texts_so_far(reply)

    def live(self, message: PublishedMessage) -> Sequence[RunEvent]:
        """Events of a published message. If it skips a number, a message was lost: sets `is_behind`."""
        event = message.event(self._codec)
        if event is None:
            return ()  # a message that another program published on our channel
        if event.seq is None:
            return (event,) if self._replayed_until is None or event.timestamp >= self._replayed_until else ()
        if event.seq == self.next_seq:
            gap = () if self._first_skipped is None else self._gap_before(event)
            events = (*gap, self._mark_seen(event))
            # A life has ended, but not ours: the record knows, also if its `life` is not that of its events.
            self.is_behind = event.final and not self.is_over
            return events
        if event.seq > self.next_seq:
            self.is_behind = True
        return ()

    def _mark_seen(self, event: RunEvent) -> RunEvent:
        """Move the cursor behind this event, and return it."""
        assert event.seq is not None
        self._next_seq = event.seq + 1
        self.is_over = event.final and event.life >= (self._life or 1)
        return event

    def _texts_so_far(self, kept: Mapping[str, str]) -> Iterator[RunEvent]:
        """What was streamed before this watcher joined, of a reply and of a tool's output: one event with
        offset 0 for each.

        Nothing of what another program has changed: the event of the whole text has all of it.
        """
        output = {name.removeprefix("tool_"): kept[name] for name in kept if name.startswith("tool_")}
        for name, text in (("llm.delta", kept), ("tool.delta", output)):
            if not text.get("call"):
                continue
            try:
                event = self._text_so_far(name, text)
            except PARSE_ERRORS:
                continue
            if self._replayed_until is None or event.timestamp > self._replayed_until:
                self._replayed_until = event.timestamp
            yield event

    def _text_so_far(self, name: str, kept: Mapping[str, str]) -> RunEvent:
        head, attempt = self._read_head, int(kept["attempt"])
        assert head is not None, "call set_head first"
        of_reply = name == "llm.delta"
        own = {"call": kept["call"], "kind": "text"} if of_reply else {"call_id": kept["call"]}
        return RunEvent(
            name=name,
            seq=None,
            run_id=head.run_id,
            session_id=head.session_id,
            agent_id=head.agent_id,
            life=head.life,
            attempt=attempt,
            timestamp=datetime.fromisoformat(kept["at"]).astimezone(UTC),
            payload={"attempt": attempt, "offset": 0, "text": self._text_of(kept), **own},
        )

    def _text_of(self, kept: Mapping[str, str]) -> str:
        """The text, which is kept in parts. A worker of the previous version keeps it as one, and does not
        delete the parts of an earlier text."""
        names = takewhile(kept.__contains__, (f"text{n}" for n in count(1)))
        text = self._codec.decode_pieces("".join([kept["text"], *(kept[name] for name in names)]))
        return text if len(text) == int(kept["chars"]) else self._codec.decode_pieces(kept["text"])

    def _skip_unreadable(self, seq: int) -> None:
        """Skip an unreadable event. The next readable event is preceded by `events.gap`."""
        self._first_skipped = self._first_skipped or self.next_seq
        self._next_seq = seq + 1

    def _gap_before(self, event: RunEvent) -> Iterator[RunEvent]:
        """An `events.gap` event if events before this one were deleted or cannot be read."""
        assert event.seq is not None
        begin, self._first_skipped = self._first_skipped or self.next_seq, None
        if event.seq > begin:
            gap = {"name": "events.gap", "seq": None, "worker": None, "final": False}
            yield event.model_copy(update={**gap, "payload": {"from": begin, "to": event.seq - 1}})
