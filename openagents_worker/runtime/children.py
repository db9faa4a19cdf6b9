"""Children: the only place where a run delegates to other agents, and waits for them.

A child is a run of its own, with a record, a journal and a message. Its id derives from the recorded call
that has created it, so a call that is made again finds its child. The script that ends a child also stores
its result as a fact of the parent, and wakes the parent, which is parked meanwhile and holds no slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from openagents_worker.agents import MultiAgentConfig
from openagents_worker.arguments import number_of
from openagents_worker.errors import (
    BudgetExhausted,
    DelegationTooDeep,
    OpenAgentsError,
    RequestInvalid,
    RunNotFound,
)
from openagents_worker.jsontext import canonical_json, loads, size_of
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
)
from openagents_worker.runtime.child_budgets import Siblings
from openagents_worker.runtime.child_runs import ChildRuns, Delegation
from openagents_worker.runtime.given_up import CHECK_AGAIN_MS, GivenUpChildren
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.journal import digest_of
from openagents_worker.runtime.latch import RunTransferred
from openagents_worker.runtime.recorder import Outcome, Recorder
from openagents_worker.runtime.services import Services
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.facts import FactKind
from openagents_worker.store.formats import WRITTEN, translate_parse_errors
from openagents_worker.store.scripts import MAX_CHILDREN
from openagents_worker.telemetry.logs import get_logger

__all__ = ["Children"]

log = get_logger(__name__)

DEFAULT_CONFIG = MultiAgentConfig()


@dataclass(slots=True)
class _Batch:
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
        spent: Mapping[str, RunUsage],
    ) -> None:
        """`spent`: what is recorded of the usage of children that the program has given up, by their ids."""
        self.transferred: RunResult[Any] | None = None
        """The result of the agent to which the run was transferred."""
        self._identity = identity
        self._request = request
        self._recorder = recorder
        self._writer = writer
        self._config = services.assembly.config.multi_agent or DEFAULT_CONFIG
        self._runs = ChildRuns(
            identity, request, recorder, writer=writer, services=services, config=self._config
        )
        self._given_up = GivenUpChildren(recorder, life=identity.life, spent=spent)

    @property
    def is_router(self) -> bool:
        """Whether the agents file switches the router of the original SDK on."""
        return self._config.enabled

    def cancel_again(self, calls: Sequence[str]) -> None:
        """Cancel the children of these calls, which the program has given up: an attempt that has died may
        not have done so. A child that is waited for again goes on."""
        for call in calls:
            if call not in self._runs.pending:
                self._runs.cancel_soon(self._runs.child_id(call))

    async def used_at_end(self) -> RunUsage | None:
        """The run ends: what its children have used so far whose results are not recorded. None if there are
        no such children. The usage of the run has those that it has given up and that have ended."""
        given_up = self._given_up
        if given_up.is_empty and not given_up.have_counted and not self._runs.unrecorded:
            return None
        if not self._recorder.is_latched:
            await given_up.wait_for_ends()
        return await given_up.used_so_far()

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
        call = Delegation(asked, self._isolation_of(asked), siblings, wakes_together, output_type)
        self._check_depth(asked)
        fields = {**asked.model_dump(mode="json", exclude_defaults=True), "place": place}
        digest = digest_of(canonical_json(fields))
        try:
            value = await self._recorder.call("delegate", asked.agent_id, digest, partial(self._make, call))
        finally:
            self._runs.settle(call)
        with translate_parse_errors(WRITTEN, run_id=self._identity.run_id):
            result = RunResult[Any].model_validate(value["result"])
        self._recorder.waits.facts.held.has_result(value)
        return result

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

    def _check_depth(self, asked: ChildRequest) -> None:
        most = self._config.max_delegation_depth
        if self._runs.depth >= most:
            raise DelegationTooDeep(
                f"the run cannot delegate to {asked.agent_id!r}: {self._runs.depth} runs are above it, "
                f"at most {most} are allowed",
                hint="an agent that delegates to itself may never end; multi_agent.max_delegation_depth in "
                "the agents file is the limit",
                agent_id=self._identity.agent_id,
            )

    async def _make(self, call: Delegation, info: CallInfo) -> Outcome:
        """Create the child, wait for its end, and return its result."""
        call.id = info.call_id
        child_id = self._runs.child_id(info.call_id)
        before, replaced = self._given_up.take_back(child_id)
        if before is not None:
            self._runs.pending[info.call_id] = before.asked_again()
            call.was_given_up = True
        self._recorder.replaces(info.call_id, f"{FactKind.DELEGATED}:{info.call_id}")
        try:
            await self._runs.take_extensions()
            if call.asked.background:
                await self._runs.begin(call, info, child_id)
                return self._in_background(call, info, child_id)
            text = await self._result_of(call, info, child_id)
            held, changes = await self._left_by(call, info)
        except asyncio.CancelledError:
            if info.is_given_up is not None and info.is_given_up():
                await self._give_up(info.call_id, child_id)
            raise
        except OpenAgentsError as error:
            if info.call_id in self._runs.pending:  # it waits no longer, for example because of a limit
                await self._give_up(info.call_id, child_id)
                replaced = []
            return Outcome(error=error, may_retry=False, taken=replaced)
        with translate_parse_errors(WRITTEN, run_id=child_id):
            result = loads(text)
            usage = RunUsage.model_validate(result.get("usage") or {})
            beside_answer = {"artifacts": result.get("artifacts")}
        return Outcome(
            value={"result": result, **held},
            usage=self._given_up.not_counted(child_id, usage),
            state=changes,
            taken=[f"{FactKind.CHILD}:{info.call_id}", *replaced],
            # The size of the answer was checked when the child ended.
            is_accepted=size_of({**beside_answer, "state": changes}) <= self._recorder.max_record_bytes,
        )

    async def _give_up(self, call_id: str, child_id: str) -> None:
        """The run does not wait for this child any more: cancel it. What it uses still counts.

        First the fact is stored: the next attempt would take the result of a child that was cancelled without
        it. If it cannot be stored, the next attempt gives the child up, or waits for it again.
        """
        pending = self._runs.pending.get(call_id)
        try:
            if pending is not None and not self._recorder.is_latched:
                await self._given_up.add(call_id, pending)
        except asyncio.CancelledError:  # raised after the write
            self._runs.cancel_soon(child_id)
            raise
        self._runs.cancel_soon(child_id)

    async def _left_by(self, call: Delegation, info: CallInfo) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a shared child has changed in the state of the session, see `RunHeldTurns.take`."""
        if call.isolation != "shared" or self._recorder.context is None:
            return {}, {}
        return await self._recorder.waits.facts.held.take(info.call_id, self._recorder.context.state)

    def _in_background(self, call: Delegation, info: CallInfo, child_id: str) -> Outcome:
        metadata = {"background": True, "agent_id": call.asked.agent_id}
        result = RunResult[Any](run_id=child_id, task_id=child_id, metadata=metadata)
        pending = self._runs.pending.get(info.call_id)
        reserved = dict(pending.reserved) if pending is not None else {}
        return Outcome(value={"result": result.model_dump(mode="json"), "reserved": reserved})

    async def _result_of(self, call: Delegation, info: CallInfo, child_id: str) -> str:
        """The result of the child, as JSON."""
        waits, fact = self._recorder.waits, f"{FactKind.CHILD}:{info.call_id}"
        pending = self._runs.pending.get(info.call_id)
        is_known = pending is not None and pending.life == self._identity.life
        if call.was_given_up or (not is_known and not waits.facts.holds(fact)):
            text = await self._runs.begin(call, info, child_id)
            if text is not None:
                return text
        begins_again = False
        while True:
            settled = self._recorder.spending.children_settled
            found = await waits.until(
                info,
                WaitKind.CHILD,
                name=child_id,
                fact=fact,
                timeout_ms=CHECK_AGAIN_MS,
                needs_all=call.wakes_together,
                begins_again=begins_again,
                must_park=call.isolation == "shared",
            )
            if found is not None:
                return found.text
            if settled != self._recorder.spending.children_settled:
                continue
            begins_again = True
            if (text := await self._runs.begin(call, info, child_id)) is not None:
                return text

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
        running = _Batch()
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
        found = await self._look_at(task_id, with_result=False)
        return str(found["status"] if isinstance(found, Mapping) else found)

    async def task_info(self, task_id: str) -> Mapping[str, str]:
        """The same as `status`, with `agent_id`, and the `output` or `error` of a child that has ended."""
        found = await self._look_at(task_id, with_result=True)
        return found if isinstance(found, Mapping) else {"status": found}  # recorded by an earlier version

    async def _look_at(self, task_id: str, *, with_result: bool) -> Any:
        fields = ("state", "parent", "agent", "result")[: 4 if with_result else 2]

        async def make(_: CallInfo) -> Outcome:
            key = self._writer.store.keys("run", task_id)
            state, parent, *more = await self._writer.store.ask(lambda r: r.hmget(key, *fields))
            if state is None or parent != self._identity.run_id:
                error = RunNotFound(f"{task_id!r} is not a task of this run, or it has expired")
                return Outcome(error=error, may_retry=False)
            known = RunState(state) if state in set(RunState) else RunState.RUNNING
            status = "running"
            if known.is_terminal:
                status = "completed" if known is RunState.COMPLETED else "failed"
            if not with_result:
                return Outcome(value=status)
            ended = self._ended(task_id, more[1] if known.is_terminal else None)
            return Outcome(value={"status": status, "agent_id": more[0] or "", **ended}, is_accepted=True)

        if not isinstance(task_id, str) or not task_id:
            raise RequestInvalid("task_id must be the task_id of a result of delegate(background=True)")
        return await self._recorder.call("delegate", "task_status", digest_of(task_id), make)

    def _ended(self, run_id: str, text: str | None) -> dict[str, str]:
        """The output and the error in a stored result, as text. Raises `RecordUnreadable`."""
        if not text:
            return {}
        with translate_parse_errors(WRITTEN, run_id=run_id):
            result = RunResult[Any].model_validate_json(self._writer.store.codec.decode(text))
        details = result.error_details
        return {"output": str(result.final_output or ""), "error": details.message if details else ""}

    async def transfer(self, request: ChildRequest | Mapping[str, Any]) -> NoReturn:
        """Let another agent end the run. Raises `RunTransferred` when it has ended."""
        asked = parse_child_request(request).model_copy(update={"background": False})
        self.transferred = await self.delegate(asked, output_type=self._request.output_type)
        raise RunTransferred(asked.agent_id)


async def _collect(running: _Batch, results: dict[int, RunResult[Any]], until: str) -> None:
    """Wait for children and take their results. Raises what one of their tasks has raised."""
    done, _ = await asyncio.wait(running.tasks, return_when=until)
    for task in sorted(done, key=running.tasks.__getitem__):
        results[running.tasks.pop(task)] = task.result()
