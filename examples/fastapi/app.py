"""A web application: a page submits a question to an agent, shows its events live, and can cancel the run.

Start Redis and a worker as described in `README.md`, then `uvicorn examples.fastapi.app:app`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Header, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel

from openagents_worker import AsyncClient, AsyncRunHandle, OpenAgentsError, RunRequest, sse

PAGE = Path(__file__).parent / "page.html"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Create one client for the server. It reads OPENAGENTS_REDIS_URL and needs no agents file."""
    async with AsyncClient() as app.state.client:
        yield


app = FastAPI(lifespan=lifespan)


class Question(BaseModel):
    """`conversation` is the id of the session. With a `run_id`, a repeated request is the same run."""

    text: str
    conversation: str
    run_id: str | None = None


class Run(BaseModel):
    run_id: str


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(PAGE)


@app.post("/runs", status_code=202)
async def ask(question: Question, request: Request) -> Run:
    """Submit a run and return at once. A real application would derive the session from the login."""
    client: AsyncClient = request.app.state.client
    run_id = {"run_id": question.run_id} if question.run_id else {}
    handle = await client.submit(
        RunRequest(agent_id="assistant", session_id=question.conversation, input_text=question.text, **run_id)
    )
    return Run(run_id=handle.id)


@app.get("/runs/{run_id}/events")
async def follow(
    run_id: str, request: Request, last_event_id: Annotated[str | None, Header()] = None
) -> StreamingResponse:
    """The events of a run as Server-Sent Events. A browser that reconnects sends Last-Event-ID."""
    handle = _handle(request, run_id)
    await handle.record()  # raises `RunNotFound` now, while the response can still get the status 404
    frames = sse(handle, last_event_id)
    return StreamingResponse(
        frames,
        media_type="text/event-stream",
        headers={
            "cache-control": "no-store",
            "x-accel-buffering": "no",
        },  # otherwise nginx would buffer the events
    )


@app.post("/runs/{run_id}/cancel", status_code=202)
async def cancel(run_id: str, request: Request) -> Run:
    await _handle(request, run_id).cancel("stopped on the page")
    return Run(run_id=run_id)


@app.exception_handler(OpenAgentsError)
async def explain(_: Request, error: Exception) -> JSONResponse:
    """Each error of the library has an HTTP status. Its code and message contain no secrets."""
    assert isinstance(error, OpenAgentsError)
    return JSONResponse({"code": error.code, "message": error.message}, status_code=error.http_status)


def _handle(request: Request, run_id: str) -> AsyncRunHandle[str]:
    client: AsyncClient = request.app.state.client
    return client.handle(run_id)
