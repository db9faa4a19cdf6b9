"""Sending. The only place where a producer stores a fact about a run, such as a value that is sent to it.

The functions are plans. The docstrings of `send`, `steer` and `extend` are those of methods of clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, assert_never

from pydantic import JsonValue, ValidationError

from openagents_worker.arguments import (
    TEN_YEARS_MS,
    number_of,
    optional_text,
    reject_unstorable,
    text_of_caller,
)
from openagents_worker.errors import RequestInvalid, RequestTooLarge, RunConflict
from openagents_worker.jsontext import dumps
from openagents_worker.models import EXTENDABLE, RunBudget, RunRecord, WaitKind
from openagents_worker.producer.plans import Sending
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.redaction import shown_reason
from openagents_worker.store import scripts
from openagents_worker.store.client import Plan
from openagents_worker.store.facts import FactKind
from openagents_worker.store.records import record_plan, run_not_found
from openagents_worker.store.scripts import FactAnswer, FactResult
from openagents_worker.store.signals import (
    MAX_SIGNALS,
    MAX_SIGNALS_BYTES,
    check_message_id,
    check_signal_name,
    signal_fact,
    signal_text,
)

__all__ = ["extend", "send", "steer", "store_fact"]


def send(
    publishing: PublishingApp,
    run_id: str,
    name: str,
    value: JsonValue = None,
    *,
    message_id: str | None = None,
) -> Plan[None]:
    """Send a value to the run, which it gets from `context.receive(name)`. It is kept until then.

    The same `message_id` counts once: give one if you repeat a call. Raises `RunNotFound`, `RunConflict`
    if the run has ended, `RequestInvalid`, and `RequestTooLarge`.
    """
    check_signal_name(name)
    check_message_id(message_id)
    text = signal_text(value, publishing.settings.max_payload_bytes)
    yield from store_fact(publishing, run_id, signal_fact(name), text, message_id)


def steer(
    publishing: PublishingApp,
    run_id: str,
    text: str,
    *,
    by: str | None = None,
    message_id: str | None = None,
) -> Plan[None]:
    """Give the run a further message of the user. In the built-in patterns, the next model call has it.

    Nothing is interrupted. The event `run.steered` reports that the run has taken the message. A message
    that arrives after the last model call is not used. Arguments and errors as those of `send`.
    """
    if not isinstance(text, str) or not text.strip():
        raise RequestInvalid("the text of steer must be a text that is not empty")
    check_message_id(message_id)
    value = {"text": text, "by": shown_reason(optional_text("by", by))}
    message = signal_text(value, publishing.settings.max_payload_bytes)
    yield from store_fact(publishing, run_id, f"{FactKind.STEER}:", message, message_id)


def extend(
    publishing: PublishingApp,
    run_id: str,
    budget: RunBudget | Mapping[str, Any],
    *,
    by: str | None = None,
) -> Plan[None]:
    """Extend the budget of the run: limits of steps, tool calls, cost, tokens or duration, none
    of them smaller. The limit for which a paused run waits must become larger.

    A run that waits because its budget is used up (`on_breach="pause"`) continues. Any other run uses the
    extension when it needs it. Raises as `send` does.
    """
    limits = _extension_of(budget)
    by = optional_text("by", by)
    run: RunRecord = yield from record_plan(publishing.keys, text_of_caller("run_id", run_id))
    used_up = {each.name: each.limit for each in run.waiting if each.kind is WaitKind.BUDGET and each.limit}
    before = (run.request.budget if run.request else None) or RunBudget()
    for name, limit in limits.items():
        if name in used_up:
            if limit <= used_up[name]:
                raise RequestInvalid(
                    f"{name}: the new limit {limit} is not larger than the limit {used_up[name]:g}, which is "
                    "used up",
                    run_id=run_id,
                )
        elif (old := getattr(before, name)) is not None and limit < old:
            raise RequestInvalid(
                f"{name}: the new limit {limit} is smaller than the limit {old} of the run", run_id=run_id
            )
    yield from store_fact(
        publishing, run_id, f"{FactKind.EXTEND}:", dumps({"budget": limits, "by": shown_reason(by)})
    )


def _extension_of(budget: RunBudget | Mapping[str, Any]) -> dict[str, Any]:
    """The limits of an extension by name. Raises `RequestInvalid`."""
    try:
        parsed = budget if isinstance(budget, RunBudget) else RunBudget.model_validate(budget)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in found[:5])
        raise RequestInvalid(f"the budget is not valid: {problems}") from None
    if parsed.max_duration_ms is not None:
        number_of("max_duration_ms", parsed.max_duration_ms, least=1, most=TEN_YEARS_MS)
    limits = parsed.model_dump(exclude_none=True)
    if other := sorted(limits.keys() - set(EXTENDABLE)):
        raise RequestInvalid(
            f"{other[0]} cannot be extended", hint=f"these limits can: {', '.join(EXTENDABLE)}"
        )
    if not limits:
        raise RequestInvalid("the budget has no limit", hint=f"give one of {', '.join(EXTENDABLE)}")
    reject_unstorable(limits, "budget")
    return limits


def store_fact(
    publishing: PublishingApp, run_id: str, name: str, value: str, message_id: str | None = None
) -> Plan[FactResult]:
    """Store a fact about a run, and send the message that wakes it. The arguments are those of the script.

    The answer is OK, SAME or ALREADY. Raises `RunNotFound`, `RunConflict` for a run that is over, and
    `RequestTooLarge` if the run has too many facts that it did not take yet.
    """
    result: FactResult = yield scripts.fact(
        run_id=text_of_caller("run_id", run_id),
        name=name,
        value=value,
        message_id=message_id or "",
        max_facts=MAX_SIGNALS,
        max_bytes=MAX_SIGNALS_BYTES,
    )
    match result.answer:
        case FactAnswer.UNKNOWN:
            raise run_not_found(run_id)
        case FactAnswer.ENDED:
            raise RunConflict(
                f"the run {run_id!r} is over ({result.state}): it receives nothing any more", run_id=run_id
            )
        case FactAnswer.FULL:
            raise RequestTooLarge(
                f"the run {run_id!r} has not received what was sent to it before: "
                f"{MAX_SIGNALS:,} values or {MAX_SIGNALS_BYTES:,} bytes at most may wait for it",
                hint="send it again when the run has received some of the values",
                run_id=run_id,
            )
        case FactAnswer.OK | FactAnswer.SAME | FactAnswer.ALREADY:
            if result.wakes:
                yield Sending(partial(publishing.send_wakes, result.wakes))
            return result
        case _:
            assert_never(result.answer)
