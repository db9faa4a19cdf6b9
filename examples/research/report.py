"""The report: what the producer asks for, and the lead returns."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Finding(BaseModel):
    question: str
    answer: str
    sources: list[str] = Field(description="The files from which the answer is known.")


class Report(BaseModel):
    """What a team has found out about a question."""

    summary: str = Field(description="The answer to the whole question, in a few sentences.")
    findings: list[Finding]
