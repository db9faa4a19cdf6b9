"""Children: the only place where a run delegates to other agents, and waits for them.

A child is a run of its own, with a record, a journal and a message. Its id derives from the recorded call
that has created it, so a call that is made again finds its child. The script that ends a child also stores
its result as a fact of the parent, and wakes the parent, which is parked meanwhile and holds no slot.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, NoReturn, assert_never

from openagents_worker.agents import MultiAgentConfig
from openagents_worker.arguments import number_of
from openagents_worker.errors import (
    AgentNotFoundError,
    BudgetExhausted,
    DelegationTooDeep,
    OpenAgentsError,
    RequestInvalid,
    RunConflict,
    RunNotFound,
)
from openagents_worker.jsontext import canonical_json, dumps, loads
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import (
    ChildRequest,
    ErrorDetails,
    RunRequest,
    RunResult,
    RunState,
    RunUsage,
    StopReason,
    WaitKind,
    parse_child_request,
    parse_request,
)
from openagents_worker.runtime.call_ids import outside_runs
from openagents_worker.runtime.calls.extending import more_of
from openagents_worker.runtime.child_budgets import Born, Grant, Shortage, Siblings, grant_of
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.journal import digest_of
from openagents_worker.runtime.latch import RunTransferred
from openagents_worker.runtime.recorder import Outcome, Recorder
from openagents_worker.runtime.services import Services
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store import scripts
from openagents_worker.store.facts import FactKind
from openagents_worker.store.formats import WRITTEN, translate_parse_errors
from openagents_worker.store.listing import extra_indexes, parent_index
from openagents_worker.store.scripts import MAX_CHILDREN, DelegateAnswer, Delegated
from openagents_worker.submission.new_run import digest_of as digest_of_request
from openagents_worker.submission.new_run import stored_text
from openagents_worker.suggest import agent_hint
from openagents_worker.telemetry.logs import get_logger

__all__ = ["DEPTH_KEY", "Children"]

log = get_logger(__name__)

DEPTH_KEY = "__openagents_delegation_depth__"
"""The key in the `metadata` of a request, as in the original SDK: how many runs are above this one."""
CHECK_AGAIN_MS = 900_000
"""How often a parked run looks whether its child has ended without a notice. Only a worker of a version that
knows no children can end one in this way."""
STOPPING_S = 0.2  # between two looks at a child that is being cancelled by its worker
ID_CHARS = 200  # of the parent's id in that of a child


@dataclass(slots=True)
class _Call:
    """A recorded call that delegates. `id` is set while it is being made."""

    asked: ChildRequest
    isolation: str
    siblings: Siblings | None = None
    wakes_together: bool = False
    output_type: Any = None
    id: str = ""


@dataclass(slots=True)
class _Running:
    """The children of one `delegate_many` that are running: their tasks, by the number of the request."""

    tasks: dict[asyncio.Task[RunResult[Any]], int] = field(default_factory=dict)


class Children:
    """The children of one attempt."""

    def __init__(
        self,
        identity: RunIdentity,
        request: RunRequest,
        recorder: Recorder,
        *,
        writer: RunWriter,
        services: Services,
    ) -> None:
        self.transferred: RunResult[Any] | None = None
        """The result of the agent to which the run was transferred."""
        self._identity = identity
        self._request = request
        self._recorder = recorder
        self._writer = writer
        self._services = services
        self._config = services.assembly.config.multi_agent or MultiAgentConfig()
        self._born: dict[str, Born] = {}
        for fact in recorder.waits.facts.of(FactKind.DELEGATED):
            if (born := Born.of(fact.value(run_id=identity.run_id))) is not None:
                self._born[fact.id] = born
        self._creating = asyncio.Lock()
        self._settled = 0
        self._waiting_for_budget = 0
        self._cancelling: set[asyncio.Task[None]] = set()

    @property
    def is_router(self) -> bool:
        """Whether the agents file switches the router of the original SDK on."""
        return self._config.enabled

    # --- delegate ----------------------------------------------------------------------------------------

    async def delegate(
        self,
        request: ChildRequest | Mapping[str, Any],
        *,
        siblings: Siblings | None = None,
        wakes_together: bool = False,
        place: int | None = None,
        output_type: Any = None,
    ) -> RunResult[Any]:
        """The result of another agent, recorded. `place` distinguishes equal requests of one call.

        Raises `RequestInvalid`, `DelegationTooDeep`, `AgentNotFoundError`, `BudgetExhausted`.
        """
        asked = parse_child_request(request)
        call = _Call(asked, self._isolation_of(asked), siblings, wakes_together, output_type)
        self._check_depth(asked)
        fields = {**asked.model_dump(mode="json", exclude_defaults=True), "place": place}
        digest = digest_of(canonical_json(fields))
        try:
            value = await self._recorder.call("delegate", asked.agent_id, digest, partial(self._make, call))
        finally:
            self._settle(call)
        with translate_parse_errors(WRITTEN, run_id=self._identity.run_id):
            result = RunResult[Any].model_validate(value["result"])
        if asked.background:
            self._born[f"background {result.run_id}"] = Born(
                result.run_id, self._identity.life, value.get("reserved") or {}, settles=False
            )
        else:
            self._recorder.budget.children = self._recorder.budget.children.plus(result.usage)
        return result

    def _settle(self, call: _Call) -> None:
        """The call has ended: what was reserved for its child is free, or part of the usage of the run."""
        if call.id:
            self._born.pop(call.id, None)
            self._settled += 1
            if call.siblings is not None:
                call.siblings.working.discard(call.id)
            if self._waiting_for_budget:
                self._recorder.waits.check_again(WaitKind.CHILD)

    def _isolation_of(self, asked: ChildRequest) -> str:
        isolation = asked.session_isolation or self._config.default_session_isolation
        if isolation == "shared" and asked.background:
            raise RequestInvalid(
                "a run in the background cannot share the session of its parent, which goes on meanwhile",
                hint="use session_isolation='forked' or 'isolated'",
            )
        if isolation == "shared" and not self._recorder.is_durable:
            raise RequestInvalid(
                "a run that is not durable cannot lend its session, because it is never parked",
                hint="submit it with durable=True, or use session_isolation='forked' or 'isolated'",
            )
        return isolation

    @property
    def _depth(self) -> int:
        depth = self._request.metadata.get(DEPTH_KEY)
        return depth if isinstance(depth, int) and not isinstance(depth, bool) and depth > 0 else 0

    def _check_depth(self, asked: ChildRequest) -> None:
        most = self._config.max_delegation_depth
        if self._depth >= most:
            raise DelegationTooDeep(
                f"the run cannot delegate to {asked.agent_id!r}: {self._depth} runs are above it, at most "
                f"{most} are allowed",
                hint="an agent that delegates to itself may never end; multi_agent.max_delegation_depth in "
                "the agents file is the limit",
                agent_id=self._identity.agent_id,
            )

    async def _make(self, call: _Call, info: CallInfo) -> Outcome:
        """Create the child, wait for its end, and return its result."""
        call.id = info.call_id
        child_id = self._child_id(info.call_id)
        self._recorder.replaces(info.call_id, f"{FactKind.DELEGATED}:{info.call_id}")
        try:
            if call.asked.background:
                await self._begin(call, info, child_id)
                return self._in_background(info, child_id)
            text = await self._result_of(call, info, child_id)
        except asyncio.CancelledError:
            if info.is_given_up is not None and info.is_given_up():
                self._cancel_soon(child_id)
            raise
        except OpenAgentsError as error:
            return Outcome(error=error, may_retry=False)
        with translate_parse_errors(WRITTEN, run_id=child_id):
            result = loads(text)
            usage = RunUsage.model_validate(result.get("usage") or {})
        return Outcome(value={"result": result}, usage=usage, taken=[f"{FactKind.CHILD}:{info.call_id}"])

    def _in_background(self, info: CallInfo, child_id: str) -> Outcome:
        result = RunResult[Any](run_id=child_id, task_id=child_id, metadata={"background": True})
        born = self._born.get(info.call_id)
        reserved = dict(born.reserved) if born is not None else {}
        return Outcome(value={"result": result.model_dump(mode="json"), "reserved": reserved})

    async def _result_of(self, call: _Call, info: CallInfo, child_id: str) -> str:
        """The result of the child, as JSON."""
        waits, fact = self._recorder.waits, f"{FactKind.CHILD}:{info.call_id}"
        born = self._born.get(info.call_id)
        is_known = born is not None and born.life == self._identity.life
        if not is_known and not waits.facts.holds(fact):
            text = await self._begin(call, info, child_id)
            if text is not None:
                return text
        begins_again = False
        while True:
            settled = self._settled
            found = await waits.until(
                info,
                WaitKind.CHILD,
                name=child_id,
                fact=fact,
                timeout_ms=CHECK_AGAIN_MS,
                needs_all=call.wakes_together,
                begins_again=begins_again,
            )
            if found is not None:
                return found.text
            if settled != self._settled:
                continue
            begins_again = True
            if (text := await self._begin(call, info, child_id)) is not None:
                return text

    # --- the child run -----------------------------------------------------------------------------------

    async def _begin(self, call: _Call, info: CallInfo, child_id: str) -> str | None:
        """Create the child or find it. Returns its result (JSON) if it has ended, else None."""
        while True:
            delegated = await self._create(call, info, child_id)
            if isinstance(delegated, Shortage):
                await self._wait_for_budget(delegated, info)
                continue
            match delegated.answer:
                case DelegateAnswer.NEW | DelegateAnswer.SAME:
                    if delegated.wakes:
                        await self._services.send_wakes(delegated.wakes)
                    return None
                case DelegateAnswer.ENDED:
                    return delegated.result
                case DelegateAnswer.STOPPING:
                    await asyncio.sleep(STOPPING_S)
                case DelegateAnswer.UNKNOWN_AGENT:
                    raise AgentNotFoundError(
                        f"no worker knows the agent {call.asked.agent_id!r}",
                        hint=agent_hint(call.asked.agent_id, delegated.known_agents),
                        agent_id=call.asked.agent_id,
                    )
                case DelegateAnswer.FULL:
                    raise RequestInvalid(
                        f"the run has {MAX_CHILDREN:,} children that have not ended, the largest number",
                        hint="let it wait for some of them, as delegate_many does with max_concurrency",
                    )
                case DelegateAnswer.CONFLICT:
                    raise RunConflict(
                        f"the run_id {child_id!r} of a child belongs to another run",
                        hint="do not submit runs with ids that contain ':c:'",
                    )
                case DelegateAnswer.CANCEL | DelegateAnswer.FENCED | DelegateAnswer.MISPLACED:
                    raise AssertionError("the store raises RunLatched for these answers")
                case _:
                    assert_never(delegated.answer)

    async def _create(self, call: _Call, info: CallInfo, child_id: str) -> Delegated | Shortage:
        """Reserve the budget of the child and create it. One at a time, so that nothing is reserved twice."""
        async with self._creating:
            born = self._born.get(info.call_id)
            grant: Grant | Shortage
            if born is None:
                grant = self._grant(call)
                if isinstance(grant, Shortage):
                    return grant
            else:
                grant = Grant(call.asked.budget, born.reserved)
            if call.siblings is not None:
                call.siblings.working.add(info.call_id)
            born = Born(child_id, self._identity.life, grant.reserved)
            delegated = await self._writer.delegate(**self._arguments(call, info, child_id, grant, born))
            if delegated.answer in (DelegateAnswer.NEW, DelegateAnswer.SAME):
                self._born[info.call_id] = born
            return delegated

    def _grant(self, call: _Call) -> Grant | Shortage:
        asked = call.asked.budget or self._config.default_child_budget
        others = [born for id_, born in self._born.items() if id_ != call.id]
        return grant_of(asked, self._recorder.budget, self._recorder.usage, others, call.siblings)

    async def _wait_for_budget(self, shortage: Shortage, info: CallInfo) -> None:
        """Wait until a child ends that has reserved what this one needs, or until the budget is extended.

        Raises `BudgetExhausted`.
        """
        if shortage.is_reserved:
            self._waiting_for_budget += 1
            try:
                await self._recorder.waits.until(info, WaitKind.CHILD, name="budget", begins_again=True)
            finally:
                self._waiting_for_budget -= 1
        else:
            current, limit = shortage.current, shortage.limit
            await more_of(self._recorder, shortage.name, current, limit, shortage.error())

    def _arguments(
        self, call: _Call, info: CallInfo, child_id: str, grant: Grant, born: Born
    ) -> dict[str, Any]:
        """The arguments of the script `delegate`. Raises `RequestInvalid` and `RequestTooLarge`."""
        request = self._request_of(call, child_id, grant)
        place = self._recorder.rules.place_of(info.call_id)
        delegated = {
            "run_id": child_id,
            "life": born.life,
            "reserved": dict(born.reserved),
            "call_kind": place.kind,
            "node": place.node,
            "scope": place.scope,
        }
        lists = [parent_index(self._identity.run_id), *extra_indexes(request.tenant, request.labels)]
        return {
            "call": info.call_id,
            "child_id": child_id,
            "agent_id": request.agent_id,
            "session_id": request.session_id,
            "queue": "",
            "mode": call.isolation,
            "background": call.asked.background,
            "digest": digest_of_request(request),
            "uid": secrets.token_hex(8),
            "request": stored_text(request),
            "input_text": request.input_text,
            "delegated": dumps(delegated),
            "lists": lists,
        }

    def _request_of(self, call: _Call, child_id: str, grant: Grant) -> RunRequest:
        """The request of the child: it inherits the tenant, the durability, the labels and the deps."""
        parent, asked = self._request, call.asked
        fields = {
            "agent_id": asked.agent_id,
            "session_id": self._session_of(call.isolation, child_id),
            "input_text": asked.input_text,
            "run_id": child_id,
            "parent_run_id": parent.run_id,
            "metadata": {DEPTH_KEY: self._depth + 1},
            "budget": grant.budget,
            "durable": self._recorder.is_durable,
            "tenant": parent.tenant,
            "labels": {**parent.labels, **asked.labels},
            "deps": asked.deps if asked.deps is not None else parent.deps,
            "output_type": call.output_type,
        }
        return parse_request(fields, max_bytes=self._services.settings.max_payload_bytes)

    def _session_of(self, isolation: str, child_id: str) -> str:
        match isolation:
            case "shared":
                return self._request.session_id
            case "forked":
                return f"{self._request.session_id[:ID_CHARS]}:fork:{child_id.rpartition(':')[2]}"
        return f"child:{child_id}"

    def _child_id(self, call_id: str) -> str:
        seed = f"{self._identity.run_id}\0{self._identity.uid}\0{call_id}"
        digest = blake2b(seed.encode(errors="surrogatepass"), digest_size=6).hexdigest()
        return f"{self._identity.run_id[:ID_CHARS]}:c:{digest}"

    def _cancel_soon(self, child_id: str) -> None:
        """The program does not wait for this child any more."""
        task = outside_runs(self._cancel(child_id), name=f"cancel {child_id}")
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancel(self, child_id: str) -> None:
        reason = f"the run {self._identity.run_id} does not wait for it any more"
        call = scripts.cancel(run_id=child_id, reason=reason, force=False)
        try:
            cancelled = await self._services.store.run(call)
            await self._services.send_wakes(cancelled.wakes)
        except OpenAgentsError as error:  # it ends with its parent at the latest
            log.warning("run.child_not_cancelled", run_id=child_id, error=error.message)

    # --- several children --------------------------------------------------------------------------------

    async def delegate_many(
        self, requests: Sequence[ChildRequest | Mapping[str, Any]], max_concurrency: int | None
    ) -> list[RunResult[Any]]:
        """The results of several children, in the order of the requests. Raises as `delegate` does for an
        invalid request; an agent that is not known gives a failed result."""
        asked = [parse_child_request(request) for request in requests]
        number_of("the number of requests of delegate_many", len(asked), most=MAX_CHILDREN)
        if max_concurrency is not None:
            number_of("max_concurrency", max_concurrency, least=1, most=MAX_CHILDREN)
        at_once = min(max_concurrency or len(asked), len(asked))
        siblings, together = Siblings(at_once), at_once == len(asked)
        results: dict[int, RunResult[Any]] = {}
        running = _Running()
        try:
            for place, request in enumerate(asked):
                if len(running.tasks) >= at_once:
                    await _collect(running, results, asyncio.FIRST_COMPLETED)
                item = self._item(place, request, siblings, together)
                running.tasks[asyncio.create_task(item, name=f"child {place}")] = place
            while running.tasks:
                await _collect(running, results, asyncio.FIRST_COMPLETED)
        finally:
            for task in running.tasks:
                task.cancel()
            if running.tasks:
                await asyncio.wait(running.tasks)
        return [results[place] for place in range(len(asked))]

    async def _item(
        self, place: int, request: ChildRequest, siblings: Siblings, together: bool
    ) -> RunResult[Any]:
        try:
            return await self.delegate(request, siblings=siblings, wakes_together=together, place=place)
        except BudgetExhausted:
            raise
        except OpenAgentsError as error:
            if self._recorder.verdict is not None:
                raise
            details = ErrorDetails.from_exception(error)
            return RunResult(run_id="", stop_reason=StopReason.FAILED, error_details=details)

    # --- background and transfer -------------------------------------------------------------------------

    async def task_status(self, task_id: str) -> str:
        """`running`, `completed` or `failed`: the state of a child, recorded. Raises `RunNotFound`."""

        async def make(_: CallInfo) -> Outcome:
            key = self._writer.store.keys("run", task_id)
            state, parent = await self._writer.store.ask(lambda r: r.hmget(key, "state", "parent"))
            if state is None or parent != self._identity.run_id:
                error = RunNotFound(f"{task_id!r} is not a task of this run, or it has expired")
                return Outcome(error=error, may_retry=False)
            known = RunState(state) if state in set(RunState) else RunState.RUNNING
            if not known.is_terminal:
                return Outcome(value="running")
            return Outcome(value="completed" if known is RunState.COMPLETED else "failed")

        if not isinstance(task_id, str) or not task_id:
            raise RequestInvalid("task_id must be the task_id of a result of delegate(background=True)")
        return str(await self._recorder.call("delegate", "task_status", digest_of(task_id), make))

    async def transfer(self, request: ChildRequest | Mapping[str, Any]) -> NoReturn:
        """Let another agent end the run. Raises `RunTransferred` when it has ended."""
        asked = parse_child_request(request).model_copy(update={"background": False})
        self.transferred = await self.delegate(asked, output_type=self._request.output_type)
        raise RunTransferred(asked.agent_id)


async def _collect(running: _Running, results: dict[int, RunResult[Any]], until: str) -> None:
    """Wait for children and take their results. Raises what one of their tasks has raised."""
    done, _ = await asyncio.wait(running.tasks, return_when=until)
    for task in sorted(done, key=running.tasks.__getitem__):
        results[running.tasks.pop(task)] = task.result()
