"""A product on the web: a page asks an agent, sees its tools and its words as they come, and may stop it.

With Redis and a worker that knows the agent running (`README.md` beside this file says how):
`uvicorn examples.fastapi.app:app`.
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
    """One client for the life of the server: it reads OPENAGENTS_REDIS_URL and knows nothing of agents."""
    async with AsyncClient() as app.state.client:
        yield


app = FastAPI(lifespan=lifespan)


class Question(BaseModel):
    """`conversation` is the session: what was said in it is remembered. `run_id` makes a repeat harmless."""

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
    """Submit; the agent is not waited for. A real product takes the conversation from its login."""
    client: AsyncClient = request.app.state.client
    given = {"run_id": question.run_id} if question.run_id else {}
    handle = await client.submit(
        RunRequest(agent_id="assistant", session_id=question.conversation, input_text=question.text, **given)
    )
    return Run(run_id=handle.id)


@app.get("/runs/{run_id}/events")
async def follow(
    run_id: str, request: Request, last_event_id: Annotated[str | None, Header()] = None
) -> StreamingResponse:
    """The run as Server-Sent Events. A browser that was cut off sends Last-Event-ID and goes on after it."""
    handle = _handle(request, run_id)
    await handle.record()  # 404 now: once the first byte is out, a status can no longer be sent
    frames = sse(handle, last_event_id)
    return StreamingResponse(
        frames,
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},  # nginx would hold the words back
    )


@app.post("/runs/{run_id}/cancel", status_code=202)
async def cancel(run_id: str, request: Request) -> Run:
    await _handle(request, run_id).cancel("stopped on the page")
    return Run(run_id=run_id)


@app.exception_handler(OpenAgentsError)
async def explain(_: Request, error: Exception) -> JSONResponse:
    """Every error of the library knows the status that fits it, and says nothing a visitor may not know."""
    assert isinstance(error, OpenAgentsError)
    return JSONResponse({"code": error.code, "message": error.message}, status_code=error.http_status)


def _handle(request: Request, run_id: str) -> AsyncRunHandle[str]:
    client: AsyncClient = request.app.state.client
    return client.handle(run_id)
