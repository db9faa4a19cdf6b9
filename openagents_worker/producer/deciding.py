"""Deciding. The only place where a producer reads and makes decisions about calls of runs.

The functions are plans. Their docstrings are those of the methods of clients and handles.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

from pydantic import JsonValue
from typing_extensions import Unpack

from openagents_worker.arguments import optional_text, reject_unstorable, text_of_caller
from openagents_worker.errors import ApprovalNotPending, RequestInvalid, RequestTooLarge
from openagents_worker.jsontext import dumps, loads
from openagents_worker.models import MAX_ID_CHARS, Approval, Decision
from openagents_worker.producer.call_names import find_call
from openagents_worker.producer.plans import Sending
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.redaction import shown_json, shown_reason
from openagents_worker.store import scripts
from openagents_worker.store.approvals import ApprovalFilters, list_approvals, run_approvals
from openagents_worker.store.client import Plan
from openagents_worker.store.facts import FactKind
from openagents_worker.store.formats import WRITTEN, translate_parse_errors
from openagents_worker.store.index_pages import Page
from openagents_worker.store.keys import Keys
from openagents_worker.store.records import run_not_found
from openagents_worker.store.scripts import DecideAnswer, DecideResult, DecisionKind

__all__ = [
    "RESOLVE_ACTIONS",
    "ResolveAction",
    "approvals",
    "approvals_of_run",
    "approve",
    "deny",
    "resolve",
]

ResolveAction = Literal["rerun", "skip", "fail"]
RESOLVE_ACTIONS = ("rerun", "skip", "fail")
SHOWN_CALLS = 10

_FACT_OF = {DecisionKind.APPROVAL: FactKind.ASK, DecisionKind.RESOLUTION: FactKind.INTENT}
"""The facts whose ids are those of the calls that may wait for a decision of this kind."""


def resolve(
    publishing: PublishingApp,
    run_id: str,
    call_id: str,
    action: ResolveAction,
    *,
    by: str,
    result: JsonValue = None,
    note: str | None = None,
) -> Plan[Decision]:
    """Decide about a call whose outcome is unknown, because its worker died while it made the call.

    `rerun` makes the call again, with the same idempotency key. `skip` continues with `result` as the
    result of the call. `fail` ends the run as failed. `call_id` may be the beginning of the id. Raises
    `RunNotFound`, `RequestInvalid` and, if somebody else has decided before, `ApprovalNotPending`.
    """
    if text_of_caller("action", action) not in RESOLVE_ACTIONS:
        raise RequestInvalid(
            f"{action!r} is not an action for a call whose outcome is unknown",
            hint=f"the actions are {', '.join(RESOLVE_ACTIONS)}",
        )
    if result is not None and action != "skip":
        raise RequestInvalid(f"a result can only be given with skip, not with {action}")
    reject_unstorable(result, "result")
    decision: dict[str, Any] = {
        "action": action,
        "by": _name_of_decider(by),
        "note": shown_reason(optional_text("note", note)),
    }
    if action == "skip":
        decision["result"] = result
    return (
        yield from _decide(
            publishing, run_id, call_id, DecisionKind.RESOLUTION, "tool.outcome_resolved", decision
        )
    )


def approve(
    publishing: PublishingApp,
    run_id: str,
    call_id: str,
    *,
    by: str,
    arguments: Mapping[str, JsonValue] | None = None,
    note: str | None = None,
) -> Plan[Decision]:
    """Approve a call that waits for an approval. The run continues when all calls of its turn are decided.

    `arguments` replaces all arguments of the model. The worker checks them. `by` is the name of the person
    who decides, for the events of the run. `call_id` may be the beginning of the id. Raises `RunNotFound`,
    `RequestInvalid` and, if somebody else has decided before, `ApprovalNotPending`.
    """
    if arguments is not None and not isinstance(arguments, Mapping):
        raise RequestInvalid(
            f"arguments must be a mapping of names to values, not {type(arguments).__name__}",
            hint="give all arguments of the call; they replace those of the model",
        )
    reject_unstorable(arguments, "arguments")
    decision = {**_decided("approve", by, note), "arguments": None if arguments is None else dict(arguments)}
    return (yield from _decide(publishing, run_id, call_id, DecisionKind.APPROVAL, "tool.approved", decision))


def deny(
    publishing: PublishingApp, run_id: str, call_id: str, *, by: str, note: str | None = None
) -> Plan[Decision]:
    """Deny a call that waits for an approval. The model gets `note`. Raises as `approve` does."""
    decision = _decided("deny", by, note)
    return (yield from _decide(publishing, run_id, call_id, DecisionKind.APPROVAL, "tool.denied", decision))


def approvals(
    publishing: PublishingApp,
    *,
    limit: int = 100,
    cursor: str | None = None,
    **filters: Unpack[ApprovalFilters],
) -> Plan[Page[Approval]]:
    """A page of the calls that wait for an approval. The run that asked last is the first.

    The calls of one run are on one page, which may therefore have a few more than `limit`. Raises
    `RequestInvalid` for a filter, limit or cursor that is not valid.
    """
    return list_approvals(publishing.keys, filters, limit=limit, cursor=cursor)


def approvals_of_run(publishing: PublishingApp, run_id: str) -> Plan[list[Approval]]:
    """The calls of the run that wait for an approval, the oldest first."""
    return run_approvals(publishing.keys, run_id)


def _decided(action: str, by: Any, note: Any) -> dict[str, Any]:
    return {
        "action": action,
        "by": _name_of_decider(by),
        "note": shown_reason(optional_text("note", note)) or None,
    }


def _name_of_decider(by: Any) -> str:
    """Who decides. Raises `RequestInvalid` without a name: an audit needs one."""
    name = shown_reason(text_of_caller("by", by).strip())
    if not name:
        raise RequestInvalid("by is empty", hint="name who decides, such as an email address")
    if len(name) > MAX_ID_CHARS:
        raise RequestInvalid(f"by has {len(name):,} characters, but at most {MAX_ID_CHARS} are allowed")
    return name


def _decide(
    publishing: PublishingApp,
    run_id: str,
    call_id: str,
    kind: DecisionKind,
    event: str,
    decision: Mapping[str, Any],
) -> Plan[Decision]:
    run_id = text_of_caller("run_id", run_id)
    call = yield from _whole_call_id(publishing.keys, run_id, text_of_caller("call_id", call_id), kind)
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    value = {name: each for name, each in {**decision, "call_id": call, "at": at}.items() if each is not None}
    text = dumps(value)
    limit = publishing.settings.max_payload_bytes
    if len(text.encode()) > limit:
        raise RequestTooLarge(
            f"the decision has {len(text.encode()):,} bytes, but at most {limit:,} are allowed",
            hint="give a reference (a URL, a key) to the data",
            run_id=run_id,
        )
    payload = {name: each for name, each in value.items() if name != "result"}
    decided = yield scripts.decide(
        run_id=run_id, kind=kind, call=call, value=text, event=event, payload=shown_json(payload)
    )
    if decided.answer is not DecideAnswer.OK:
        raise _not_decided(decided, run_id, call)
    if decided.wakes:
        yield Sending(partial(publishing.send_wakes, decided.wakes))
    return Decision.model_validate(value)


def _whole_call_id(keys: Keys, run_id: str, call_id: str, kind: DecisionKind) -> Plan[str]:
    """The call that waits and whose id, in full or as displayed, begins with this text; else the text.

    Calls that are decided about count only if no other one is found. Raises `RequestInvalid` if there are
    several.
    """
    names = frozenset((yield lambda r: r.hkeys(keys("facts", run_id))))
    prefix = f"{_FACT_OF[kind]}:"
    calls = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    undecided = [call for call in calls if f"{kind}:{call}" not in names]
    found = sorted(find_call(undecided, call_id) or find_call(calls, call_id))
    if not found:
        return call_id
    if len(found) > 1:
        raise RequestInvalid(
            f"{call_id!r} is the beginning of {len(found)} calls: {', '.join(found[:SHOWN_CALLS])}",
            hint="give more characters of the id",
            run_id=run_id,
        )
    return found[0]


def _not_decided(decided: DecideResult, run_id: str, call_id: str) -> Exception:
    """The error for a decision that does not count."""
    if decided.answer is DecideAnswer.UNKNOWN:
        return run_not_found(run_id)
    first = None
    if decided.decision:
        with translate_parse_errors(WRITTEN, run_id=run_id):
            first = Decision.model_validate({"call_id": call_id, **loads(decided.decision)})
    if first is not None:
        problem = f"{first.by} has already decided: {first.action}"
    elif decided.answer is DecideAnswer.GONE:
        problem = "the run has ended"
    else:
        problem = "no call of the run with this id waits for a decision"
    return ApprovalNotPending(
        f"the call {call_id!r} does not wait for a decision: {problem}",
        hint=f"openagents-worker show {run_id} lists what the run waits for",
        run_id=run_id,
        call_id=call_id,
        decision=first,
    )
