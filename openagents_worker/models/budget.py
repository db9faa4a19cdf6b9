"""Budgets. The only place that defines the limits of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from openagents_worker.models.base import RequestModel

__all__ = ["EXTENDABLE", "NO_LIMITS", "RunBudget"]

EXTENDABLE = ("max_steps", "max_tool_calls", "max_cost_usd", "max_total_tokens", "max_duration_ms")
"""The limits that can be extended while a run works."""


class RunBudget(RequestModel):
    """Limits of one run. None: the default of the agent or the deployment. Durations are in milliseconds."""

    max_steps: int | None = Field(
        default=None, ge=1, description="Number of steps (model turns). null: the pattern's max_steps."
    )
    max_duration_ms: int | None = Field(
        default=None, ge=1, description="Milliseconds of work; waiting is not counted. null: no limit."
    )
    max_tool_calls: int | None = Field(
        default=None, ge=0, description="Number of tool calls. null: no limit."
    )
    max_cost_usd: float | None = Field(
        default=None,
        ge=0,
        description="USD that model calls may cost; a call that may exceed it is not made. null: no limit.",
    )
    max_total_tokens: int | None = Field(
        default=None, ge=1, description="Tokens that the model's calls may use in total. null: no limit."
    )
    on_breach: Literal["end", "pause"] | None = Field(
        default=None,
        description="What happens when steps, tool calls, cost, tokens or the duration are used up: the run "
        "ends (end), or waits until somebody extends its budget (pause). null: end.",
    )
    max_resume_attempts: int | None = Field(
        default=None, ge=0, description="Number of retries of one failed call. null: 3."
    )
    max_validation_retries: int | None = Field(
        default=None,
        ge=0,
        description="Number of further answers if one does not match the output_type. null: 3.",
    )

    def within(self, limits: RunBudget | None) -> RunBudget:
        """A budget with the smaller one of each two limits; None: no limit. Its `on_breach` precedes."""
        if limits is None:
            return self
        names = [name for name in RunBudget.model_fields if name != "on_breach"]
        both = [(name, getattr(self, name), getattr(limits, name)) for name in names]
        return RunBudget(
            on_breach=self.on_breach or limits.on_breach,
            **{name: min((n for n in (a, b) if n is not None), default=None) for name, a, b in both},
        )


NO_LIMITS = RunBudget()
"""The budget of a run that has none. It is frozen, so all runs share it."""
