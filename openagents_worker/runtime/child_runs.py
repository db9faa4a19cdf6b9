"""Child runs: the only place that creates the run of another agent, and decides what it may use."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, assert_never

from openagents_worker.agents import MultiAgentConfig
from openagents_worker.errors import AgentNotFoundError, OpenAgentsError, RequestInvalid, RunConflict
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import ChildRequest, RunBudget, RunRequest, parse_request
from openagents_worker.runtime.call_ids import outside_runs
from openagents_worker.runtime.calls.extending import more_of
from openagents_worker.runtime.child_budgets import Grant, PendingChild, Shortage, Siblings, grant_of
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.rules import EXTEND
from openagents_worker.runtime.services import Services
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store import scripts
from openagents_worker.store.facts import FactKind
from openagents_worker.store.formats import DELEGATES, HOLDS_TURNS
from openagents_worker.store.listing import extra_indexes
from openagents_worker.store.scripts import MAX_CHILDREN, DelegateAnswer, Delegated
from openagents_worker.submission.new_run import digest_of, stored_text
from openagents_worker.suggest import agent_hint
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.signals import with_traceparent

__all__ = ["DEPTH_KEY", "ChildRuns", "Delegation"]

log = get_logger(__name__)

DEPTH_KEY = "__openagents_delegation_depth__"
"""The key in the `metadata` of a request, as in the original SDK: how many runs are above this one."""
STOPPING_S = 0.2  # between two looks at a child that is being cancelled by its worker
ID_CHARS = 200  # of the parent's id in that of a child


@dataclass(slots=True)
class Delegation:
    """A recorded call that delegates. `id` is set while it is being made.

    `wakes_together`: the parent continues when all such children have ended. `was_given_up`: the program had
    cancelled the call, and makes it again.
    """

    asked: ChildRequest
    isolation: str
    siblings: Siblings | None = None
    wakes_together: bool = False
    output_type: Any = None
    id: str = ""
    was_given_up: bool = False


class ChildRuns:
    """The child runs that one attempt creates."""

    def __init__(
        self,
        identity: RunIdentity,
        request: RunRequest,
        recorder: Recorder,
        *,
        writer: RunWriter,
        services: Services,
        config: MultiAgentConfig,
    ) -> None:
        self.pending = recorder.spending.children
        for fact in recorder.waits.facts.of(FactKind.DELEGATED):
            if (pending := PendingChild.of(fact.value(run_id=identity.run_id))) is not None:
                self.pending[fact.id] = pending
        self.unrecorded = set(self.pending)
        """The calls that have created a child, and whose records are perhaps not stored."""
        self._identity = identity
        self._request = request
        self._recorder = recorder
        self._writer = writer
        self._services = services
        self._config = config
        self._creating = asyncio.Lock()
        self._cancelling: set[asyncio.Task[None]] = set()

    @property
    def depth(self) -> int:
        """The number of runs above this one."""
        depth = self._request.metadata.get(DEPTH_KEY)
        return depth if isinstance(depth, int) and not isinstance(depth, bool) and depth > 0 else 0

    def settle(self, call: Delegation) -> None:
        """The call has ended: what was reserved for its child is free, or part of the usage of the run."""
        if call.id:
            if not self._recorder.is_latched:
                self.unrecorded.discard(call.id)
            if call.siblings is not None:
                call.siblings.working.discard(call.id)
            self._recorder.spending.settle_child(call.id, self._recorder.waits)

    async def begin(self, call: Delegation, info: CallInfo, child_id: str) -> str | None:
        """Create the child or find it. Returns its result (JSON) if it has ended, else None."""
        while True:
            delegated = await self._create(call, info, child_id)
            if isinstance(delegated, Shortage):
                await self._wait_for_budget(delegated, info)
                continue
            match delegated.answer:
                case DelegateAnswer.NEW | DelegateAnswer.SAME:
                    if delegated.answer is DelegateAnswer.NEW:
                        self._recorder.waits.facts.reset(f"{FactKind.CHILD}:{info.call_id}")
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

    async def _create(self, call: Delegation, info: CallInfo, child_id: str) -> Delegated | Shortage:
        """Reserve the budget of the child and create it. One at a time, so that nothing is reserved twice."""
        async with self._creating:
            pending = self.pending.get(info.call_id)
            grant: Grant | Shortage
            if pending is None:
                grant = self._grant(call)
                if isinstance(grant, Shortage):
                    return grant
            else:
                grant = Grant.of(self._asked_budget(call), pending.reserved)
            if call.siblings is not None:
                call.siblings.working.add(info.call_id)
            pending = PendingChild(child_id, self._identity.life, grant.reserved)
            self.pending[info.call_id] = pending
            self.unrecorded.add(info.call_id)
            delegated = await self._writer.delegate(**self._arguments(call, info, child_id, grant, pending))
            if delegated.answer not in (DelegateAnswer.NEW, DelegateAnswer.SAME):
                del self.pending[info.call_id]
            return delegated

    def _grant(self, call: Delegation) -> Grant | Shortage:
        others = [pending for id_, pending in self.pending.items() if id_ != call.id]
        spending, usage = self._recorder.spending, self._recorder.checkpoints.total_usage
        tool_calls = self._recorder.counts.of("tool") + spending.used_by_children.tool_calls
        return grant_of(
            self._asked_budget(call),
            self._recorder.budget,
            usage,
            others,
            in_calls={
                "max_cost_usd": spending.reserved_usd,
                "max_total_tokens": spending.reserved_tokens,
                "max_tool_calls": max(0, tool_calls - usage.tool_calls),
            },
            # The run goes on beside a child in the background, and needs as much.
            shares=(call.siblings.shares if call.siblings is not None else 1) + call.asked.background,
        )

    def _asked_budget(self, call: Delegation) -> RunBudget | None:
        return call.asked.budget or self._config.default_child_budget

    async def take_extensions(self) -> None:
        """Take the extensions of the budget again for which an earlier attempt has waited in this call."""
        rules = self._recorder.rules
        while rules.next_kind() == EXTEND and (name := rules.next_name(recorded=True)):
            await more_of(self._recorder, name, 0, 0, Shortage(name, 0, 0, is_reserved=False).error())

    async def _wait_for_budget(self, shortage: Shortage, info: CallInfo) -> None:
        """Wait until something ends that has reserved what this child needs, or until the budget is extended.

        Raises `BudgetExhausted`.
        """
        spending = self._recorder.spending
        if shortage.in_calls:
            await spending.one_settled(self._recorder.in_progress)
        elif shortage.is_reserved:
            await spending.child_settled(self._recorder.waits, info)
        else:
            current, limit = shortage.current, shortage.limit
            await more_of(self._recorder, shortage.name, current, limit, shortage.error())

    def _arguments(
        self, call: Delegation, info: CallInfo, child_id: str, grant: Grant, pending: PendingChild
    ) -> dict[str, Any]:
        """The arguments of the script `delegate`. Raises `RequestInvalid` and `RequestTooLarge`."""
        request = self._request_of(call, child_id, grant)
        place = self._recorder.rules.place_of(info.call_id)
        delegated = {
            "run_id": child_id,
            "life": pending.life,
            "reserved": dict(pending.reserved),
            "call_kind": place.kind,
            "node": place.node,
            "scope": place.scope,
        }
        lists = extra_indexes(request.tenant, request.labels, request.parent_run_id)
        options = with_traceparent({})  # the spans of the child belong to the trace of this call
        return {
            "call": info.call_id,
            "child_id": child_id,
            "agent_id": request.agent_id,
            "session_id": request.session_id,
            "queue": "",
            "mode": call.isolation,
            "background": call.asked.background,
            "digest": digest_of(request),
            "uid": secrets.token_hex(8),
            "request": stored_text(request),
            "input_text": request.input_text,
            "delegated": dumps(delegated),
            "lists": lists,
            "canvas": dumps(options) if options else "",
            "format": HOLDS_TURNS if call.isolation == "shared" else DELEGATES,
        }

    def _request_of(self, call: Delegation, child_id: str, grant: Grant) -> RunRequest:
        """The request of the child: it inherits the tenant, the durability, the labels and the deps."""
        parent, asked = self._request, call.asked
        fields = {
            "agent_id": asked.agent_id,
            "session_id": self._session_of(call.isolation, child_id),
            "input_text": asked.input_text,
            "run_id": child_id,
            "parent_run_id": parent.run_id,
            "metadata": {DEPTH_KEY: self.depth + 1},
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

    def child_id(self, call_id: str) -> str:
        seed = f"{self._identity.run_id}\0{self._identity.uid}\0{call_id}"
        digest = blake2b(seed.encode(errors="surrogatepass"), digest_size=6).hexdigest()
        return f"{self._identity.run_id[:ID_CHARS]}:c:{digest}"

    def cancel_soon(self, child_id: str) -> None:
        """The program does not wait for this child any more."""
        task = outside_runs(self._cancel(child_id), name=f"cancel {child_id}")
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _cancel(self, child_id: str) -> None:
        reason = f"the run {self._identity.run_id} does not wait for it any more"
        call = scripts.cancel(run_id=child_id, reason=reason, force=False, given_up_in=self._identity.life)
        try:
            cancelled = await self._services.store.run(call)
            await self._services.send_wakes(cancelled.wakes)
        except OpenAgentsError as error:  # it ends with its parent at the latest
            log.warning("run.child_not_cancelled", run_id=child_id, error=error.message)
