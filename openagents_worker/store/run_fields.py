"""Run fields: the only place that defines which fields of a run record the scripts load.

A script loads the fields that it mentions (`run.queue`), because each field costs time in each call.
"""

from __future__ import annotations

import re

__all__ = ["MARK", "run_fields_in_lua"]

MARK = "local RUN_FIELDS, COUNTERS_FROM, run_of = fields_of_runs(count_of)"
"""The line of `lua/lib/run.lua` that is replaced."""

TEXTS = (
    "state", "fence", "owner", "agent", "session", "queue", "cancel", "canvas", "tell", "durable", "usage",
    "uid", "started", "claimed", "cancel_reason", "suspicion", "on_busy", "interrupted", "parent_call",
)  # fmt: skip
NUMBERS = (
    "attempt", "life", "steps", "retries", "recoveries", "stuck", "emit_no", "due", "expires", "format",
    "force_at",
)  # fmt: skip
"""Whole numbers. An invalid value counts as 0."""
COUNTERS = ("seq", "active_ms", "retries_in_all", "tellings")
"""Whole numbers that Redis increases. An invalid value is replaced, else Redis would refuse to do so."""

_FIELD = re.compile(r"(?<!\bk)\.(\w+)")  # not the name of a key: `k.due()`
_TEXT = re.compile(r"'(\w+)'")


def run_fields_in_lua(script: str) -> str:
    """The script with the fields that it needs. It is unchanged if it does not load runs."""
    if MARK not in script:
        return script
    read, named = set(_FIELD.findall(script)), set(_TEXT.findall(script))
    texts = ["state", *(name for name in TEXTS[1:] if name in read)]  # `state`: whether there is a record
    numbers = [name for name in NUMBERS if name in read]
    counters = [name for name in COUNTERS if name in read | named]
    names = [*texts, *numbers, *counters]
    values = [f"{name} = v_[{at}] or ''" for at, name in enumerate(names, 1)]
    values[len(texts) : len(texts) + len(numbers)] = [
        f"{name} = count_of(v_[{at}])" for at, name in enumerate(numbers, len(texts) + 1)
    ]
    lua = [
        f"local RUN_FIELDS = {{{', '.join(map(repr, names))}}}",
        f"local COUNTERS_FROM = {len(texts) + len(numbers) + 1}",
        f"local function run_of(R, v_) return {{id = R, {', '.join(values)}}} end",
    ]
    return script.replace(MARK, "\n".join(lua))
