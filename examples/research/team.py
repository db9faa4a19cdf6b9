"""The lead of the team, as a program: it splits a question, asks a researcher about each part, and merges.

Each researcher is a run of its own, on any worker. The lead waits for them without holding a slot.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, Field

from examples.research.report import Report
from openagents_worker import ChildRequest, RunContext, RunResult

AT_ONCE = 2
"""How many researchers work at the same time: a limit for the load of the model."""
SPLIT = "Split this question into two to five questions that can be answered independently of each other."
MERGE = "Write a report about the question from these notes of your team. Use nothing but the notes."


class Plan(BaseModel):
    questions: list[str] = Field(min_length=1, max_length=5)


async def lead(context: RunContext) -> dict[str, Any]:
    """Plan, delegate, merge. Each line with `await` is recorded: a worker that dies repeats none of them."""
    split = await context.call_llm(f"{SPLIT}\n\n{context.input_text}", output_type=Plan)
    plan: Plan = split.structured_output
    asked = [ChildRequest(agent_id="researcher", input_text=question) for question in plan.questions]
    results = await context.delegate_many(asked, max_concurrency=AT_ONCE)
    notes = [_note(*found) for found in zip(plan.questions, results, strict=True)]
    prompt = f"{MERGE}\n\nThe question: {context.input_text}\n\nThe notes:\n{json.dumps(notes)}"
    merged = await context.call_llm(prompt, output_type=Report)
    report: Report = merged.structured_output
    return report.model_dump()


def _note(question: str, result: RunResult[Any]) -> dict[str, str]:
    """What a researcher has found, or why there is nothing: one that fails does not stop the others."""
    if result.ok:
        return {"question": question, "answer": result.output}
    reason = result.error_details.message if result.error_details else result.stop_reason
    return {"question": question, "answer": f"unknown ({reason})"}
