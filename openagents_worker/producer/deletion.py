"""Deleting a session. The only place that says in which order its runs are cancelled and all of it goes."""

from __future__ import annotations

import time
from collections.abc import Callable

from openagents_worker.errors import SessionBusy
from openagents_worker.store import scripts
from openagents_worker.store.client import Plan
from openagents_worker.store.keys import Keys
from openagents_worker.store.records import read_ids, states_plan
from openagents_worker.store.scripts import DeleteAnswer, Deleted

__all__ = ["deletion"]

RUNS_A_CALL = 100
PATIENCE_S = 5.0  # for Celery to be told of what has just ended, and with a session that is given new runs
PAUSE_S = 0.05


def deletion(
    keys: Keys, session_id: str, *, force: bool, clock: Callable[[], float] = time.monotonic
) -> Plan[int]:
    """Deletes the session and its runs, and returns how many runs there were. Raises `SessionBusy`.

    Beside scripts and questions it yields seconds to wait (a float), and wake-ups to be sent.

    Runs that live are cancelled with `force` and are otherwise in the way, before anything is deleted. An end
    that Celery does not know yet is waited for; with `force` not for ever.
    """
    until = clock() + PATIENCE_S
    if not force and (live := (yield from _live_runs(keys, session_id))):
        raise _busy(session_id, live[-1])
    runs = 0
    while True:
        too_late = clock() >= until
        answer: Deleted = yield scripts.delete_session(
            session_id=session_id, limit=RUNS_A_CALL, even_if_not_notified=force and too_late
        )
        runs += answer.runs
        match answer.answer:
            case DeleteAnswer.DELETED:
                return runs
            case DeleteAnswer.MORE:
                pass
            case DeleteAnswer.NOT_NOTIFIED if not too_late:
                yield PAUSE_S
            case DeleteAnswer.BUSY if force and not too_late:
                for run_id in (yield from _live_runs(keys, session_id)):
                    cancelled = yield scripts.cancel(run_id=run_id, reason="session deleted", force=True)
                    yield cancelled.wakes
            case _:
                raise _busy(session_id, answer.run_id)


def _live_runs(keys: Keys, session_id: str) -> Plan[list[str]]:
    """The last of the queue first, the holder last: cancelled in this order, no end starts another run."""
    known = yield from read_ids(keys("index", f"session={session_id}"))
    waiting = yield from read_ids(keys("session_queue", session_id))
    holder = yield lambda r: r.hget(keys("session", session_id), "holder")
    placed = dict.fromkeys([*reversed(waiting), *([holder] if holder else [])])
    ids = [*(run_id for run_id in known if run_id not in placed), *placed]
    states = yield from states_plan(keys, ids)
    return [id_ for id_, state in states.items() if state is not None and not state.is_terminal]


def _busy(session_id: str, run_id: str) -> SessionBusy:
    return SessionBusy(
        f"the session {session_id!r} cannot be deleted: its run {run_id!r} has not ended, or Celery does not "
        "know yet that it has",
        hint="cancel it, wait for it, or delete with force=True, which cancels all of the session's runs",
        session_id=session_id,
        run_id=run_id,
    )
