"""Sessions: the only place that reads stored sessions and turns them into values."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

from openagents_worker.errors import SessionNotFound
from openagents_worker.jsontext import dumps, loads
from openagents_worker.models import RunArtifact
from openagents_worker.quick_init import quick_init
from openagents_worker.store.client import AsyncStore, Plan, Reader, Store
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.formats import WRITTEN, stored_format, translate_parse_errors
from openagents_worker.store.keys import Keys
from openagents_worker.store.paging import IDS_PER_PAGE, NEWEST_BYTES, PageSize, read_ids
from openagents_worker.store.plan import CODEC

__all__ = [
    "SessionStore",
    "TranscriptSummary",
    "SessionView",
    "aread_session",
    "read_session",
    "session_plan",
    "summary_of",
]

SESSION_KEYS = ("session", "session_queue", "transcript", "artifacts", "session_state")
# Messages or artifacts per command: reading a long transcript must not delay the commands of others.
MAX_PAGE_ITEMS = 200
FIRST_PAGE_ITEMS = 20  # the size of the items is not known yet: each may have a megabyte


@quick_init
@dataclass(frozen=True, slots=True)
class TranscriptSummary:
    """A text that stands for the oldest messages of a session when a run reads it.

    `epoch` counts the summaries of the session from 1; each one includes the summary before it. `messages` is
    the number of stored messages that it stands for. They stay stored: a run that is resumed or forked from
    an earlier time needs them.
    """

    epoch: int
    messages: int
    text: str

    def to_json(self) -> str:
        """The stored form. Number and count are fields of their own."""
        return dumps({"text": self.text})


def summary_of(epoch: int, messages: int, text: str) -> TranscriptSummary | None:
    """The summary with this stored form; None if there is none. Raises the errors of parsing."""
    return TranscriptSummary(epoch, messages, str(loads(text)["text"])) if epoch and text else None


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session at one moment: its runs, and everything that completed runs have written.

    `holder` is the id of the run that occupies the session, or None. `waiting` has the ids of the waiting
    runs, the next one first. `transcript` has all messages, oldest first. `summary` is what later runs see in
    place of the first of them; None: they see them all. `bytes` is the memory that the session takes in Redis
    (`MEMORY USAGE`, an estimate).
    """

    session_id: str
    holder: str | None
    waiting: tuple[str, ...]
    transcript: tuple[Mapping[str, Any], ...]
    artifacts: tuple[RunArtifact, ...]
    state: Mapping[str, Any]
    bytes: int
    summary: TranscriptSummary | None = None


def read_session(store: Store, session_id: str) -> SessionView:
    """Read a whole session as of one moment, in pages. Raises `SessionNotFound`."""
    return store.execute(session_plan(store.keys, session_id))


def aread_session(store: AsyncStore, session_id: str) -> Awaitable[SessionView]:
    """As `read_session`, for asyncio."""
    return store.execute(session_plan(store.keys, session_id))


def session_plan(keys: Keys, session_id: str, newest: int | None = None) -> Plan[SessionView]:
    """With `newest`: at most so many messages and so many artifacts, the last ones (fewer if they are large),
    and the first thousand waiting runs.

    Reads short values and the lengths of the lists in one transaction, then the lists up to these lengths.

    This gives the state of one moment, because the lists only grow at their end. The exception is a queue of
    more than 1,000 runs: runs behind the first page may move up in the meantime.
    """

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=True)
        pipeline.hgetall(keys("session", session_id))
        pipeline.hgetall(keys("session_state", session_id))
        pipeline.zrange(keys("session_queue", session_id), 0, IDS_PER_PAGE - 1)
        pipeline.llen(keys("transcript", session_id))
        pipeline.llen(keys("artifacts", session_id))
        for name in SESSION_KEYS:
            pipeline.memory_usage(keys(name, session_id))
        return pipeline.execute()

    replies = yield question
    if not any(replies):
        raise SessionNotFound(
            f"the session {session_id!r} does not exist",
            hint="its first run creates a session; it expires OPENAGENTS_SESSION_TTL_S after its last run",
            session_id=session_id,
        )
    record, state, waiting, message_count, artifact_count, *sizes = replies
    if len(waiting) == IDS_PER_PAGE and newest is None:
        waiting += yield from read_ids(keys("session_queue", session_id), begin=IDS_PER_PAGE)
    transcript = yield from _items(keys("transcript", session_id), message_count, newest)
    artifacts = yield from _items(keys("artifacts", session_id), artifact_count, newest)
    codec: PayloadCodec = yield CODEC
    with translate_parse_errors(stored_format(record.get("format")), session_id=session_id):
        return SessionView(
            session_id,
            record.get("holder"),
            tuple(dict.fromkeys(waiting)),
            tuple(filter(_is_message, map(loads, map(codec.decode, transcript)))),
            tuple(map(RunArtifact.model_validate_json, map(codec.decode, artifacts))),
            {name: loads(codec.decode(value)) for name, value in state.items()},
            sum(size or 0 for size in sizes),
            _newest_summary(record, codec),
        )


def _is_message(item: Any) -> bool:
    """Runs leave out what is not an object, too: another program has added it to the transcript."""
    return isinstance(item, dict)


def _newest_summary(record: Mapping[str, str], codec: PayloadCodec) -> TranscriptSummary | None:
    epoch = int(record.get("epoch", 0))
    if not epoch:
        return None
    text = codec.decode(record.get(f"compaction:{epoch}", ""))
    return summary_of(epoch, int(record.get(f"compacted:{epoch}", 0)), text)


def _items(key: str, count: int, newest: int | None) -> Plan[list[str]]:
    return _all_items(key, count) if newest is None else _newest_items(key, count, newest)


def _all_items(key: str, count: int) -> Plan[list[str]]:
    """The first `count` items of a list, read in pages. Fewer if the list is deleted in the meantime."""
    items: list[str] = []
    size = PageSize(first=FIRST_PAGE_ITEMS, max_count=MAX_PAGE_ITEMS)
    while len(items) < count:
        at, to = len(items), min(len(items) + size.count, count)
        page = yield lambda r, at=at, to=to: r.lrange(key, at, to - 1)
        if not page:
            break
        size.learn(len(page), sum(map(len, page)))
        items += page
    return items


def _newest_items(key: str, count: int, newest: int) -> Plan[list[str]]:
    """The last of these items, at most `newest`, as far as `NEWEST_BYTES` are enough for them."""
    items: list[str] = []
    read_bytes, end = 0, count
    size = PageSize(first=FIRST_PAGE_ITEMS, max_count=MAX_PAGE_ITEMS)
    while end > max(0, count - newest) and read_bytes < NEWEST_BYTES:
        begin = max(0, count - newest, end - size.count)
        page = yield lambda r, begin=begin, end=end: r.lrange(key, begin, end - 1)
        if not page:
            break
        page_bytes = sum(map(len, page))
        size.learn(len(page), page_bytes)
        items, read_bytes, end = [*page, *items], read_bytes + page_bytes, begin
    return items


class SessionStore:
    """Reads parts of a session for the runtime. The lists only grow at their end, when a run finishes.

    `upto` is an earlier length of the list (recorded in step 0): with it, a replay reads the same items
    again. `last` limits the result to the newest items. Results are ordered oldest first.
    """

    def __init__(self, store: Reader) -> None:
        self._store = store

    async def load_messages(
        self, session_id: str, *, last: int | None = None, upto: int | None = None, begin: int = 0
    ) -> list[dict[str, Any]]:
        """Messages of the transcript from the position `begin` on."""
        texts = [text async for text in self._items("transcript", session_id, last, upto, begin)]
        with translate_parse_errors(WRITTEN, session_id=session_id):
            return list(map(loads, texts))

    async def list_artifacts(
        self, session_id: str, *, last: int | None = None, upto: int | None = None
    ) -> list[RunArtifact]:
        """Artifacts of the session."""
        texts = [text async for text in self._items("artifacts", session_id, last, upto)]
        with translate_parse_errors(WRITTEN, session_id=session_id):
            return list(map(RunArtifact.model_validate_json, texts))

    async def count_messages(self, session_id: str) -> int:
        return await self._length("transcript", session_id)

    async def load_between(self, session_id: str, begin: int, end: int) -> tuple[list[Any], int]:
        """The messages at these positions of the transcript, the end excluded, and their size in characters.

        Reads them with one command: the caller limits their number.
        """
        texts = await self._page(self._store.keys("transcript", session_id), begin, end)
        with translate_parse_errors(WRITTEN, session_id=session_id):
            return list(map(loads, texts)), sum(map(len, texts))

    async def load_summary(self, session_id: str, epoch: int) -> TranscriptSummary | None:
        """The summary with this number; None if the session does not have it."""
        key = self._store.keys("session", session_id)
        count, text = await self._store.ask(
            lambda r: r.hmget(key, f"compacted:{epoch}", f"compaction:{epoch}")
        )
        with translate_parse_errors(WRITTEN, session_id=session_id):
            return summary_of(epoch, int(count or 0), self._store.codec.decode(text or ""))

    async def load_state_texts(self, session_id: str) -> dict[str, str]:
        """The state of the session: top-level key -> value as JSON text."""
        key = self._store.keys("session_state", session_id)
        texts: dict[str, str] = await self._store.ask(lambda r: r.hgetall(key))
        return self._store.codec.decode_fields(texts, *texts)

    async def _length(self, kind: str, session_id: str) -> int:
        key = self._store.keys(kind, session_id)
        return int(await self._store.ask(lambda r: r.llen(key)))

    async def _items(
        self, kind: str, session_id: str, last: int | None, upto: int | None, begin: int = 0
    ) -> AsyncIterator[str]:
        """Yield the items, read in pages, without items that are appended in the meantime."""
        end = await self._length(kind, session_id) if upto is None else upto
        if not end:
            return
        at = begin if last is None else max(begin, end - last)
        key, size = (
            self._store.keys(kind, session_id),
            PageSize(first=FIRST_PAGE_ITEMS, max_count=MAX_PAGE_ITEMS),
        )
        while at < end:
            to = min(at + size.count, end)
            page = await self._page(key, at, to)
            size.learn(len(page), sum(map(len, page)))
            for item in page:
                yield item
            at = to

    async def _page(self, key: str, at: int, to: int) -> list[str]:
        texts: list[str] = await self._store.ask(lambda r: r.lrange(key, at, to - 1))
        return list(map(self._store.codec.decode, texts))
