"""A worker by hand: the scripts that a real one calls, one call a step."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any, Self

from openagents_worker.models import ErrorDetails, RunArtifact, RunResult, StopReason
from openagents_worker.store import scripts
from openagents_worker.store.client import Cell, Store
from openagents_worker.store.formats import PARKS
from openagents_worker.store.parking import Park, Wait
from openagents_worker.store.scripts import ClaimAnswer, Wake, WriteAnswer

LEASE_MS = 60_000


class Hand:
    """Registers on entry. On exit it releases its runs, so that no key is left behind."""

    def __init__(self, url: str, **cell: Any) -> None:
        self.store = Store(Cell(url, **cell))
        self.incarnation = "hand:1"
        self._fences: dict[str, str] = {}
        self._batch = itertools.count(1)
        self._nonce = itertools.count(1)

    def __enter__(self) -> Self:
        self.register()
        return self

    def __exit__(self, *_: object) -> None:
        for run_id in self._fences:
            self.store.run(scripts.cancel(run_id=run_id, reason="the test is over", force=True))
        self.store.run(scripts.retire(incarnation=self.incarnation))
        self.store.close()

    def register(self, *agents: str) -> None:
        told = [
            word for agent in agents for word in (agent, json.dumps({"queue": "agents", "def_hash": "h"}))
        ]
        self.store.run(scripts.register(incarnation=self.incarnation, lease_ms=LEASE_MS, agents=told))

    def submit(
        self,
        run_id: str,
        session_id: str = "s1",
        *,
        queue: str = "",
        durable: bool = True,
        interrupts: str = "",
        tell: bool = False,
    ) -> None:
        """A run's record without a producer: nothing is sent."""
        request = json.dumps(
            {"agent_id": "assistant", "session_id": session_id, "input_text": "hi", "run_id": run_id}
        )
        self.store.run(
            scripts.submit(
                run_id=run_id,
                agent_id="assistant",
                session_id=session_id,
                queue=queue,
                default_queue="agents",
                digest=request,
                uid="u",
                request=request,
                canvas="",
                durable=durable,
                delay_ms=0,
                reject_if_busy=False,
                parent_run_id="",
                interrupts=interrupts,
                tell=tell,
            )
        )

    def claim(self, run_id: str) -> None:
        claimed = self.store.run(
            scripts.claim(
                run_id=run_id, incarnation=self.incarnation, nonce=f"n{next(self._nonce)}", page_bytes=1000
            )
        )
        assert claimed.answer is ClaimAnswer.CLAIMED, claimed
        self._fences[run_id] = claimed.fence

    def emit(self, run_id: str, *names: str, payload: str = "{}") -> None:
        events = [word for name in names for word in (name, payload)]
        call = scripts.emit(
            run_id=run_id, fence=self._fences[run_id], batch_no=next(self._batch), events=events
        )
        assert self.store.run(call) is WriteAnswer.OK

    def end(self, run_id: str, *, steps: int, error: BaseException | None = None, tell: bool = False) -> None:
        """A run of the session s1 from submit to its end, with that many records after its prepared start."""
        self.submit(run_id, tell=tell)
        self.claim(run_id)
        self.commit(run_id, steps=steps)
        self.finish(run_id, error=error)

    def commit(self, run_id: str, *, steps: int) -> None:
        """The prepared start and that many records after it."""
        self.commit_texts(run_id, *(json.dumps({"call": str(position)}) for position in range(steps + 1)))

    def commit_texts(self, run_id: str, *records: str) -> None:
        """These records, one by one."""
        for position, record in enumerate(records):
            call = scripts.commit(
                run_id=run_id,
                fence=self._fences[run_id],
                position=position,
                records=[record],
                usage="{}",
                batch_no=next(self._batch),
                events=[],
            )
            assert self.store.run(call) is WriteAnswer.OK

    def delta(self, run_id: str, text: str) -> None:
        self.emit(run_id, "llm.delta", payload=json.dumps({"call": "0.1", "offset": 0, "text": text}))

    def park(self, run_id: str, *waits: Wait) -> None:
        """The claimed run waits for these."""
        park = Park(waits, 0)
        call = scripts.suspend(
            run_id=run_id,
            fence=self._fences[run_id],
            kind="park",
            delay_ms=0,
            call="",
            error_code="",
            batch_no=next(self._batch),
            events=[],
            park_state=park.state,
            waits=park.waits_text,
            waiting_payload=park.event_payload,
            due_ms=park.due_ms,
            format=PARKS,
        )
        assert self.store.run(call).answer is WriteAnswer.OK

    def retry(self, run_id: str, delay_ms: int = 60_000) -> None:
        call = scripts.suspend(
            run_id=run_id,
            fence=self._fences[run_id],
            kind="retry",
            delay_ms=delay_ms,
            call="0.1",
            error_code="llm.rate_limit",
            batch_no=next(self._batch),
            events=[],
            error_details=json.dumps({"code": "llm.rate_limit", "message": "slow down", "retryable": True}),
        )
        assert self.store.run(call).answer is WriteAnswer.OK

    def finish(
        self,
        run_id: str,
        output: str = "391",
        *,
        error: BaseException | None = None,
        transcript: Iterable[dict[str, Any]] = (),
        artifacts: Iterable[RunArtifact] = (),
        state: dict[str, Any] | None = None,
    ) -> tuple[Wake, ...]:
        artifacts = list(artifacts)
        result = RunResult[Any](
            run_id=run_id,
            artifacts=artifacts,
            final_output=None if error else output,
            stop_reason=StopReason.FAILED if error else StopReason.COMPLETED,
            error_details=ErrorDetails.from_exception(error) if error else None,
        )
        end_state = "failed" if error else "completed"
        call = scripts.finish(
            run_id=run_id,
            fence=self._fences.pop(run_id),
            end_state=end_state,
            result=result.model_dump_json(),
            event=f"run.{end_state}",
            code=result.error_details.code if result.error_details else "",
            payload='{"error":"no"}' if error else "{}",
            completed=json.dumps({"stop_reason": result.stop_reason}),
            transcript=[json.dumps(message) for message in transcript],
            artifacts=[artifact.model_dump_json() for artifact in artifacts],
            state=[word for name, value in (state or {}).items() for word in (name, json.dumps(value))],
            state_removed=[],
            usage='{"llm_calls":1}',
            batch_no=next(self._batch),
            events=[],
        )
        handed = self.store.run(call)
        assert handed.answer is WriteAnswer.OK
        return handed.wakes
