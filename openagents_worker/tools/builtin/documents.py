"""Documents: `builtin_search` searches a small collection that the agents file contains."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from openagents_worker.tools.base import ToolContext
from openagents_worker.tools.typed import READS_ONLY, TypedTool

__all__ = ["BuiltinSearch"]

MAX_DOCUMENTS = 1_000
MAX_TITLE_CHARS = 500
MAX_SNIPPET_CHARS = 10_000
MAX_QUERY_CHARS = 1_000
MAX_LIMIT = 100


class Document(BaseModel):
    """An entry of the collection."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str = Field(min_length=1, max_length=MAX_TITLE_CHARS, description="The title of the document.")
    snippet: str = Field(max_length=MAX_SNIPPET_CHARS, description="Its text, or the part to show.")


SAMPLE = [
    Document(
        title="Agent Memory Design",
        snippet="Memory injection and writeback strategy for agent runtimes.",
    ),
    Document(
        title="ReAct Pattern Notes",
        snippet="Pattern loops with tool calling and reasoning steps.",
    ),
    Document(
        title="Session Concurrency Guide",
        snippet="Same session serial, cross session concurrent orchestration.",
    ),
]
"""The collection of the original SDK, on which its examples rely."""


class BuiltinSearch(TypedTool):
    name = "builtin_search"
    description = (
        "Searches the built-in collection of documents. Those that contain the most words of the query come "
        "first; those that contain none are left out."
    )
    spec = READS_ONLY

    class Config(TypedTool.Config):
        documents: list[Document] | None = Field(
            None,
            max_length=MAX_DOCUMENTS,
            description="The documents, each with `title` and `snippet`. None: three samples.",
        )

    class Params(TypedTool.Params):
        query: str = Field(
            max_length=MAX_QUERY_CHARS, description="Words to search for; empty: all documents."
        )
        limit: int = Field(3, ge=1, le=MAX_LIMIT, description="The most documents in the result.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        query = args.query.strip()
        # In a thread: many words in many documents take seconds.
        found = await asyncio.to_thread(self._found, query.lower().split())
        items = [document.model_dump() for document in found]
        return {"query": query, "items": items[: args.limit]}

    def _found(self, words: list[str]) -> list[Document]:
        documents: list[Document] = SAMPLE if self.cfg.documents is None else self.cfg.documents
        if not words:
            return documents
        counts = [(_count(words, document), document) for document in documents]
        ranked = sorted(counts, key=lambda pair: pair[0], reverse=True)  # equal ones keep their order
        return [document for count, document in ranked if count]


def _count(words: list[str], document: Document) -> int:
    text = f"{document.title} {document.snippet}".lower()
    return sum(word in text for word in words)
