"""Tools whose calls start jobs of a `job_server`. Real: their HTTP requests."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from openagents_worker.errors import PermanentToolError, RetryableToolError
from openagents_worker.tools import JobHandle, ToolExecutionSpec, ToolPlugin
from openagents_worker.tools.base import Reconciled


class Render(ToolPlugin):
    """Starts a job once; `poll_after_ms` is the pause between two questions."""

    name = "render"
    description = "Renders a film."
    durable_idempotent = False

    class Config(ToolPlugin.Config):
        url: str = ""
        poll_after_ms: int | None = None

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(background=True)

    async def invoke_background(self, params: dict[str, Any], context: Any) -> JobHandle:
        self.reached("begin", context)
        job = await self.ask("POST", "/jobs", key=context.idempotency_key)
        self.reached("submitted", context)
        return JobHandle(job_id=job["job_id"])

    async def poll_job(self, handle: JobHandle, context: Any) -> Any:
        self.reached("poll", context)
        job = await self.ask("GET", f"/jobs/{handle.job_id}")
        self.reached(job["status"], context)
        return job | {"poll_after_ms": self.cfg.poll_after_ms}

    async def cancel_job(self, handle: JobHandle, context: Any) -> bool:
        await self.ask("DELETE", f"/jobs/{handle.job_id}")
        return True

    async def ask(self, method: str, path: str, *, key: str = "") -> Any:
        headers = {"Idempotency-Key": key} if key else {}
        async with httpx.AsyncClient(base_url=self.cfg.url) as http:
            try:
                answer = await http.request(method, path, headers=headers)
            except httpx.TransportError as error:
                raise RetryableToolError(f"the service is down: {error!r}", self.name) from error
        if answer.status_code in (429, 503):
            raise RetryableToolError(f"the service answers {answer.status_code}", self.name)
        if answer.is_error:
            raise PermanentToolError(f"the service answers {answer.status_code}", self.name)
        return answer.json()

    def reached(self, moment: str, context: Any) -> None:
        """The call is at this moment. A subclass may die there."""


class Found(Render):
    """Finds the job of an interrupted call by its idempotency key."""

    async def reconcile(self, params: dict[str, Any], idempotency_key: str, context: Any) -> Reconciled:
        try:
            job = await self.ask("GET", f"/keys/{quote(idempotency_key, safe='')}")
        except PermanentToolError:
            return Reconciled.not_done()
        return Reconciled.done(JobHandle(job_id=job["job_id"]))


class Listed(ToolPlugin):
    """What the toolset `Studio` says about its tool."""

    name = "render"
    description = "Renders a film."
    durable_idempotent = False

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(background=True)


class Announces:
    """A toolset whose tool starts jobs, as it says; but the class has no methods for jobs."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.render = Render(config=config)
        self.is_open = False

    async def open(self) -> None:
        self.is_open = True

    async def list(self, context: Any) -> list[ToolPlugin]:
        return [Listed()]

    async def call(self, tool_id: str, params: dict[str, Any], context: Any) -> Any:
        raise PermanentToolError("it was called without a job", tool_id)

    async def close(self) -> None:
        self.is_open = False


class Studio(Announces):
    """A toolset whose tool starts jobs."""

    async def invoke_background(self, tool_id: str, params: dict[str, Any], context: Any) -> JobHandle:
        assert (tool_id, self.is_open) == ("render", True)
        return await self.render.invoke_background(params, context)

    async def poll_job(self, tool_id: str, handle: JobHandle, context: Any) -> Any:
        assert (tool_id, self.is_open) == ("render", True)
        return await self.render.poll_job(handle, context)

    async def cancel_job(self, tool_id: str, handle: JobHandle, context: Any) -> bool:
        assert (tool_id, self.is_open) == ("render", True)
        return await self.render.cancel_job(handle, context)


class Dies(Found):
    """Kills its process at the moments for which there is a file in the folder FAULTS_MARKS, once each."""

    def reached(self, moment: str, context: Any) -> None:
        try:
            (Path(os.environ["FAULTS_MARKS"]) / f"{context.run_id}.{moment}").unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
