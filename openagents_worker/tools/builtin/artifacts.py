"""Artifacts: `save_artifact` adds an artifact to the run's result."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from openagents_worker.errors import PermanentToolError
from openagents_worker.jsontext import dumps
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec
from openagents_worker.tools.typed import TypedTool

__all__ = ["SaveArtifact"]


class SaveArtifact(TypedTool):
    name = "save_artifact"
    description = "Saves something made during the run, such as a report or a table, beside the answer."
    spec = ToolExecutionSpec(side_effects="state")

    class Params(TypedTool.Params):
        name: str = Field(min_length=1, max_length=256, description="Its name, for example `report.md`.")
        content: str | dict[str, Any] | list[Any] = Field(
            description="The text, or any JSON object or array."
        )
        kind: str = Field("generic", description="What it is, for example `text`, `markdown` or `table`.")
        metadata: dict[str, Any] = Field(default_factory=dict, description="Further facts about it.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        if context is None:
            raise PermanentToolError("an artifact can be saved only within a run", self.name)
        context.add_artifact(args.name, kind=args.kind, payload=args.content, metadata=args.metadata)
        text = args.content if isinstance(args.content, str) else dumps(args.content)
        return {"saved": args.name, "bytes": len(text.encode())}
