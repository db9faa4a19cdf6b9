"""Kept definitions: the only place that decides with which definition of its agent a run goes on.

A run keeps the definition it began with, also on a worker that has another one. When a run begins, its worker
stores the definition. A later attempt on a worker whose own definition differs loads it, and uses it if
`agents.trust` allows. Otherwise the run goes on with the definition of the worker, and a log line says why.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from openagents_worker.agents import AgentDefinition, AgentsFile
from openagents_worker.agents.sources import AgentSource, literal_secret, read_source, sources_of
from openagents_worker.agents.stored_definition import MAX_BYTES, StoredDefinition
from openagents_worker.agents.trust import TrustedParts
from openagents_worker.context.tokens import TokenCounter
from openagents_worker.errors import OpenAgentsError, RedisRefused, text_of
from openagents_worker.models import RunRecord
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.redaction import DEFAULT_REDACT_KEYS
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.start_checks import find_problems
from openagents_worker.runtime.token_counters import counter_of
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Reader
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.definitions import DefinitionStore, NotReadable
from openagents_worker.store.fleet import read_workers
from openagents_worker.store.keys import Keys
from openagents_worker.store.scripts import Claimed
from openagents_worker.telemetry.logs import get_logger

if TYPE_CHECKING:
    from openagents_worker.runtime.lease import Lease

__all__ = ["DefinitionKeeper", "KeptAgent", "OwnAgents"]

log = get_logger(__name__)

T = TypeVar("T")

STORE_AGAIN_S = 60 * 60
"""A worker stores a definition again after an hour, in case Redis has lost it."""
MOST_KEPT = 32
"""Definitions that a process holds ready. They are few: each reload of the agents file adds one per agent."""
REFUSED_FOR_S = 60
"""So long a definition that was refused is not read again. Meanwhile a worker with the key may sign it."""
MOST_REFUSED = 256
MAX_SHOWN_CHARS = 500  # of a text that may come from outside, in a log line
NEEDS_KEY = "set OPENAGENTS_DEFINITIONS_KEY to the same secret for all workers"
NOT_STORED = "an earlier version, or a worker that could not store it, has begun the run"


class OwnAgents(Protocol):
    """The agents of this process."""

    @property
    def hashes(self) -> Mapping[str, str]: ...

    @property
    def unavailable(self) -> Mapping[str, Any]: ...

    def definition(self, agent_id: str) -> AgentDefinition | None: ...

    async def forget(self, owner: str) -> None:
        """Close what was created for the definition of this owner."""


@dataclass(slots=True)
class KeptAgent:
    """An agent with the definition that a run began with. `users` are the attempts that use it now."""

    definition: AgentDefinition
    definition_hash: str
    counter: TokenCounter | None = None
    users: int = 0

    @property
    def owner(self) -> str:
        """A name for the parts that are made from this definition. It is not a valid id of an agent."""
        return f"{self.definition.id} {self.definition_hash}"


class _NotUsable(Exception):
    """Why a stored definition is not used, and what would help."""

    def __init__(self, reason: str, hint: str | None = None, *, is_damaged: bool = False) -> None:
        super().__init__(reason)
        self.hint = hint
        self.is_damaged = is_damaged


class DefinitionKeeper:
    """Stores the definitions of the agents of a process, and holds those that its runs began with."""

    def __init__(
        self,
        sources: Mapping[str, AgentSource] | None = None,
        *,
        key: str = "",
        run_ttl_s: int = 0,
        env: Mapping[str, str] | None = None,
        redact_keys: tuple[str, ...] = DEFAULT_REDACT_KEYS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sources` are those of the agents of this process, by id; without them nothing is stored. `key` is
        the secret that all workers share; '' if there is none."""
        self._sources = sources or {}
        self._env = env or {}
        self._key = key
        self._run_ttl_s = run_ttl_s
        self._redact_keys = redact_keys
        self._clock = clock
        self._trusted = TrustedParts(self._sources.values(), BUILTIN_PATTERNS)
        self._stored_at: dict[str, float] = {}
        """When this process has last stored the definition of an agent, in seconds of `clock`."""
        self._kept: OrderedDict[tuple[str, str], KeptAgent | None] = OrderedDict()
        """By agent id and definition hash, the last used one last. None: the agent of this process has it."""
        self._refused: OrderedDict[tuple[str, str], tuple[float, str, str | None]] = OrderedDict()
        """By agent id and content hash: until when (seconds of `clock`), the reason and the hint."""
        self._lock = asyncio.Lock()

    @classmethod
    def of(cls, file: AgentsFile, settings: Settings, env: Mapping[str, str]) -> DefinitionKeeper:
        """The keeper of a worker with these agents."""
        redact_keys = file.config.redact_keys if file.config is not None else DEFAULT_REDACT_KEYS
        return cls(
            sources_of(file),
            key=settings.definitions_key or "",
            run_ttl_s=settings.run_ttl_s,
            env=env,
            redact_keys=redact_keys,
        )

    # --- when a run begins -------------------------------------------------------------------------------

    async def store(self, agent_id: str, definition_hash: str, *, run_id: str, reader: Reader) -> None:
        """Store the definition with which a run begins, unless this process has done so in the last hour.

        What prevents it is logged. The run can begin all the same. Raises the errors of the reader.
        """
        source = self._sources.get(agent_id)
        if source is None or self._is_stored(agent_id):
            return
        async with self._lock:  # runs that begin at the same time wait for the first one
            if self._is_stored(agent_id):
                return
            try:
                await self._write(source, definition_hash, self._store(reader))
            except (_NotUsable, NotReadable) as error:
                log.warning(
                    "run.definition_not_stored",
                    run_id=run_id,
                    agent_id=agent_id,
                    reason=str(error),
                    hint=getattr(error, "hint", None),
                )
            self._stored_at[agent_id] = self._clock()

    def _is_stored(self, agent_id: str) -> bool:
        stored_at = self._stored_at.get(agent_id)
        return stored_at is not None and self._clock() - stored_at < STORE_AGAIN_S

    async def _write(self, source: AgentSource, definition_hash: str, store: DefinitionStore) -> None:
        """Store a definition, without taking away the signature of a worker that has the key."""
        if literal_secret(source, self._redact_keys):
            raise _NotUsable(
                "it contains what looks like a secret, and Redis must not hold one",
                "write ${VARIABLE} in its place; such a definition is stored as it is written",
            )
        text = StoredDefinition.signed(source, self._key).to_json()
        if len(text.encode()) > MAX_BYTES:
            raise _NotUsable(f"it has more than {MAX_BYTES:,} bytes")
        if await self._is_complete(source, store):
            await store.renew(source.content_hash)
        else:
            await store.write(source.content_hash, text)
        await store.link(definition_hash, source.content_hash)

    async def _is_complete(self, source: AgentSource, store: DefinitionStore) -> bool:
        """Whether Redis holds a definition that this process need not write."""
        with suppress(ValueError, NotReadable):
            text = await store.text(source.content_hash)
            if text is not None:
                stored = StoredDefinition.of(text, source.content_hash)
                return not self._key or stored.is_signed_with(self._key)
        return False

    # --- when a run goes on ------------------------------------------------------------------------------

    async def of_run(
        self, claimed: Claimed, agent_id: str, run_id: str, *, own: OwnAgents, store: AsyncStore, lease: Lease
    ) -> KeptAgent | None:
        """The agent with the definition that a run began with; None if the run uses that of this process.

        A run that was resumed after its end uses the new definition: it may be the repair. Whoever gets an
        agent must `release` it. Raises `RedisUnreachable` at the end of the lease.
        """
        first = claimed.journal[0] if claimed.journal else None
        ids = agent_id, run_id
        return await self._of_run(first, claimed.life, ids, own, store, _WhileLeased(store, lease))

    @asynccontextmanager
    async def of_ended_run(
        self, record: RunRecord, *, own: OwnAgents, store: AsyncStore
    ) -> AsyncGenerator[KeptAgent | None]:
        """As `of_run`, for a run that has ended and has left something behind."""
        journal = await store.run(scripts.page(run_id=record.run_id, position=0, page_bytes=1))
        first = journal[0] if journal else None
        kept = await self._of_run(first, record.life, (record.agent_id, record.run_id), own, store, store)
        try:
            yield kept
        finally:
            self.release(kept)

    async def _of_run(
        self,
        first_record: str | None,
        life: int,
        ids: tuple[str, str],
        own: OwnAgents,
        store: AsyncStore,
        reader: Reader,
    ) -> KeptAgent | None:
        agent_id, run_id = ids
        began_with = self._other_definition(first_record, life, agent_id, own)
        if began_with is None or (agent_id not in own.hashes and await _is_served(agent_id, store)):
            return None
        try:
            kept = await self._usable(agent_id, began_with, own, reader)
        except _NotUsable as error:
            log.warning(
                "run.definition_not_kept",
                run_id=run_id,
                agent_id=agent_id,
                reason=str(error),
                hint=error.hint,
            )
            return None
        if kept is not None:
            kept.users += 1
            log.info("run.definition_kept", run_id=run_id, agent_id=agent_id, definition=began_with)
        return kept

    def release(self, kept: KeptAgent | None) -> None:
        """An attempt does not use the agent any more."""
        if kept is not None:
            kept.users -= 1

    def _other_definition(
        self, first_record: str | None, life: int, agent_id: str, own: OwnAgents
    ) -> str | None:
        """The hash of the definition in checkpoint 0, if this process must look for it."""
        current = own.hashes.get(agent_id)
        if not first_record or agent_id in own.unavailable or (life > 1 and current is not None):
            return None
        if current is not None and f'"{current}"' in first_record:  # almost always; nothing is parsed
            return None
        try:
            began_with = Record.from_json(first_record, 0).outcome["ok"]["definition_hash"]
        except (OpenAgentsError, LookupError, TypeError):  # the attempt says what is wrong
            return None
        return began_with if isinstance(began_with, str) and began_with != current else None

    async def _usable(
        self, agent_id: str, definition_hash: str, own: OwnAgents, reader: Reader
    ) -> KeptAgent | None:
        """The agent with this definition; None if it is that of this process, with other variables."""
        name = agent_id, definition_hash
        async with self._lock:
            if name not in self._kept:
                self._kept[name] = await self._loaded(agent_id, definition_hash, own, self._store(reader))
            self._kept.move_to_end(name)
            await self._forget_unused(own)
            return self._kept[name]

    async def _loaded(
        self, agent_id: str, definition_hash: str, own: OwnAgents, store: DefinitionStore
    ) -> KeptAgent | None:
        try:
            content_hash = await store.content_hash(definition_hash)
            source = self._sources.get(agent_id)
            if source is not None and source.content_hash == content_hash:
                return None
            if content_hash is not None:
                self._raise_if_refused(agent_id, content_hash)
            text = None if content_hash is None else await store.text(content_hash)
        except NotReadable as error:
            raise _NotUsable(str(error)) from error
        if text is None or content_hash is None:
            raise _NotUsable("it is not stored", NOT_STORED)
        try:
            definition, counter = await asyncio.to_thread(self._checked, text, content_hash, agent_id)
        except Exception as error:  # it comes from outside; no run may fail because of it
            raise self._not_usable(agent_id, content_hash, error) from error
        with suppress(NotReadable):
            await store.renew(content_hash)
            await store.link(definition_hash, content_hash)
        return KeptAgent(_with_limits_of_now(definition, own.definition(agent_id)), definition_hash, counter)

    def _raise_if_refused(self, agent_id: str, content_hash: str) -> None:
        """Raises `_NotUsable` if this content was refused a short time ago: then it is not read again."""
        until_s, reason, hint = self._refused.get((agent_id, content_hash), (0.0, "", None))
        if self._clock() < until_s:
            raise _NotUsable(reason, hint)

    def _not_usable(self, agent_id: str, content_hash: str, error: Exception) -> _NotUsable:
        """The error for a definition that is not used. It is remembered, unless the stored text is damaged:
        any worker may store that again."""
        if not isinstance(error, _NotUsable):
            is_text = isinstance(error, ValueError)
            what = str(error) if is_text else f"{type(error).__name__}: {text_of(error)}"
            error = _NotUsable(what[:MAX_SHOWN_CHARS])
        if not error.is_damaged:
            name = agent_id, content_hash
            self._refused.pop(name, None)
            self._refused[name] = self._clock() + REFUSED_FOR_S, str(error), error.hint
            if len(self._refused) > MOST_REFUSED:
                self._refused.popitem(last=False)
        return error

    def _checked(
        self, text: str, content_hash: str, agent_id: str
    ) -> tuple[AgentDefinition, TokenCounter | None]:
        """The definition in a stored text. Nothing of it is used before it is trusted. Runs in a thread."""
        try:
            stored = StoredDefinition.of(text, content_hash)
        except ValueError as error:
            raise _NotUsable(str(error), is_damaged=True) from error
        if not stored.is_signed_with(self._key):
            part = self._trusted.foreign_part(stored.source)
            if part is not None:
                unsigned = "its signature is not valid" if self._key else "this worker has no key"
                raise _NotUsable(f"no agent of this worker has its {part}, and {unsigned}", NEEDS_KEY)
        file = read_source(stored.source, self._env, self._sources.values())
        problems = find_problems(file, self._env)
        if problems or file.config is None:
            found = "; ".join(problem.text for problem in problems)
            raise _NotUsable(f"it is not valid here: {found[:MAX_SHOWN_CHARS]}")
        if file.config.agents[0].id != agent_id:
            raise _NotUsable("it is that of another agent")
        return file.config.agents[0], counter_of(file.config.agents[0])

    async def _forget_unused(self, own: OwnAgents) -> None:
        """Close the parts of definitions beyond the limit, those first that were not used for longest."""
        for name, kept in list(self._kept.items())[:-MOST_KEPT]:
            if kept is None or not kept.users:
                del self._kept[name]
                if kept is not None:
                    with suppress(Exception):  # a client that cannot be closed must not stop other runs
                        await own.forget(kept.owner)

    def _store(self, reader: Reader) -> DefinitionStore:
        return DefinitionStore(reader, run_ttl_s=self._run_ttl_s)


def _with_limits_of_now(definition: AgentDefinition, own: AgentDefinition | None) -> AgentDefinition:
    """The definition with the `llm.limits` of the agent of this process: all runs share these limits."""
    if own is None or own.llm.limits == definition.llm.limits:
        return definition
    llm = definition.llm.model_copy(update={"limits": own.llm.limits})
    return definition.model_copy(update={"llm": llm})


async def _is_served(agent_id: str, store: AsyncStore) -> bool:
    """Whether a worker that is alive has the agent, or may have it: then its runs are left to that worker."""
    try:
        workers = await store.execute(read_workers(store.keys))
    except RedisRefused:  # the user of this worker may not read the fleet
        return True
    return any(
        worker.is_alive and (agent_id in worker.agents or not worker.says_what_it_serves)
        for worker in workers
    )


@dataclass(frozen=True, slots=True)
class _WhileLeased:
    """Reads before there is an attempt. They are repeated until the lease ends."""

    store: AsyncStore
    lease: Lease

    @property
    def keys(self) -> Keys:
        return self.store.keys

    @property
    def codec(self) -> PayloadCodec:
        return self.store.codec

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        return await self.store.ask_until(question, lambda: self.lease.remaining_s() <= 0)
