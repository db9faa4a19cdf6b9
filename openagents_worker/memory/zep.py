"""`zep`: the only place that speaks to a Zep server, by its own package (zep-python 2, the extra `zep`).

A turn is stored once: the messages of a run have its id, and a repeated write-back finds them. If the server
is unreachable, the memory fails, and `on_error` decides. Nothing is kept in files, which other workers would
not see.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import quote

from pydantic import Field

from openagents_worker.errors import PluginLoadError
from openagents_worker.jsontext import dumps
from openagents_worker.memory.base import PENDING_WRITES, MemoryContext, MemoryPlugin

__all__ = ["ZepMemory"]

VIEW_KEY = "zep_memory"
TIMEOUT_S = 15.0
MAX_REPLY_BYTES = 4 * 1024 * 1024
LOOKED_AT = 50  # messages in which a repeated write-back looks for its own


class ZepMemory(MemoryPlugin):
    """Keeps the turns of a session, and what the agent was asked to remember, in a Zep server."""

    class Config(MemoryPlugin.Config):
        api_url: str = Field(
            "http://localhost:8000",
            pattern=r"^https?://",
            description="The address of the server. The variable ZEP_API_URL takes precedence.",
        )
        api_key: str | None = Field(None, description="The key of the server. null: see api_key_env.")
        api_key_env: str = Field(
            "ZEP_API_KEY", min_length=1, description="The environment variable with the key."
        )
        collection: str = Field(
            "openagents",
            min_length=1,
            max_length=64,
            description="The beginning of the ids of sessions in the server.",
        )
        search_limit: int = Field(
            5, ge=1, le=100, description="Number of messages, the newest, that a run sees."
        )
        memory_dir: str | None = Field(
            None, description="Accepted; has no effect: nothing is kept on the disk of a worker."
        )

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        _check_package()
        self._http: Any = None
        self._zep: Any = None

    async def inject(self, context: MemoryContext) -> None:
        messages = await self._newest(context, self.cfg.search_limit)
        context.memory_view[VIEW_KEY] = [
            {"role": message.role_type or message.role, "content": message.content, "source": "zep"}
            for message in messages
        ]

    async def writeback(self, context: MemoryContext) -> None:
        written = await self._newest(context, LOOKED_AT)
        if not any((message.metadata or {}).get("run_id") == context.run_id for message in written):
            await self._client().memory.add(self._session(context), messages=self._messages_of(context))
        context.state.pop(PENDING_WRITES, None)

    async def retrieve(self, query: str, context: MemoryContext) -> list[dict[str, str]]:
        """The newest messages that contain a text."""
        found = [
            {"role": message.role_type or message.role, "content": message.content, "source": "zep"}
            for message in await self._newest(context, 100)
            if query.lower() in (message.content or "").lower()
        ]
        return found[-self.cfg.search_limit :]

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()
        self._http = self._zep = None

    def _messages_of(self, context: MemoryContext) -> list[Any]:
        """The turn of a run, and what it was asked to remember."""
        output = context.state.get("_runtime_last_output")
        answer = output if isinstance(output, str) else dumps(output)
        notes = context.state.get(PENDING_WRITES) or ()
        said = [("user", context.input_text), ("assistant", answer)]
        said += [("system", _remembered(each)) for each in notes if isinstance(each, Mapping)]
        return [_message(role, text, context.run_id) for role, text in said if text]

    async def _newest(self, context: MemoryContext, count: int) -> list[Any]:
        """The newest messages of the session in the server; none if it does not know the session."""
        from zep_python import NotFoundError  # type: ignore[import-not-found,unused-ignore]

        try:
            memory = await self._client().memory.get(self._session(context), lastn=count)
        except NotFoundError:
            return []
        return list(memory.messages or ())[-count:]

    def _session(self, context: MemoryContext) -> str:
        """The id of the session in the server. It becomes a part of a path."""
        return quote(f"{self.cfg.collection}-{context.session_id}", safe="")

    def _client(self) -> Any:
        if self._zep is None:
            from zep_python.client import AsyncZep  # type: ignore[import-not-found,unused-ignore]

            from openagents_worker.http_replies import ACCEPT_ENCODING, BoundedClient

            self._http = BoundedClient(
                max_bytes=MAX_REPLY_BYTES, timeout=TIMEOUT_S, headers={"accept-encoding": ACCEPT_ENCODING}
            )
            key = self.cfg.api_key or os.environ.get(self.cfg.api_key_env) or "none"
            self._zep = AsyncZep(
                base_url=self.cfg.api_url, api_key=key, timeout=TIMEOUT_S, httpx_client=self._http
            )
        return self._zep


def _remembered(fields: Mapping[str, Any]) -> str:
    rule, reason = str(fields.get("rule", "")), str(fields.get("reason") or "")
    return f"{rule} ({reason})" if reason else rule


def _message(role: str, text: str, run_id: str) -> Any:
    from zep_python.types import Message  # type: ignore[import-not-found,unused-ignore]

    return Message(role=role, role_type=role, content=text, metadata={"run_id": run_id})


def _check_package() -> None:
    """Raises `PluginLoadError` without the package, or with a version of another API."""
    hint = "pip install 'openagents-worker[zep]'"
    try:
        found = version("zep-python")
    except PackageNotFoundError:
        raise PluginLoadError("the memory zep needs the package zep-python", hint=hint) from None
    if not found.startswith("2."):
        raise PluginLoadError(f"zep-python {found} has another API than version 2", hint=hint)
