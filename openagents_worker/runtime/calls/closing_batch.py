"""The record that closes a batch of tool calls; the items have records of their own."""

from __future__ import annotations

from collections.abc import Sequence

from openagents_worker.jsontext import canonical_json
from openagents_worker.llm.base import CallInfo
from openagents_worker.runtime.journal import digest_of
from openagents_worker.runtime.recorder import Outcome, Recorder

__all__ = ["close_batch"]


async def close_batch(recorder: Recorder, batch_id: str, tool_ids: Sequence[str], failures: int) -> None:
    """Record that all items of a batch have ended. Watchers get `tool.batch.completed` with the record.

    The batch id is not part of the identity of the call: it is another one in a fork of the run.
    """

    async def make(_: CallInfo) -> Outcome:
        counted = {"successes": len(tool_ids) - failures, "failures": failures}
        return Outcome(value=counted, events=[("tool.batch.completed", {"batch_id": batch_id, **counted})])

    await recorder.call("batch", "tools", digest_of(canonical_json(list(tool_ids))), make)
