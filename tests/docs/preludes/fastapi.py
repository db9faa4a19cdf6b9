"""A web application of FastAPI; afterwards a browser follows a run, and asks for one that does not exist."""

import uuid
from typing import Annotated

import httpx
from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse, StreamingResponse

from openagents_worker import AsyncClient, OpenAgentsError, RunRequest, sse

app = FastAPI()
client = AsyncClient()


async def check():
    request = RunRequest(
        agent_id="assistant", session_id=f"s-{uuid.uuid4().hex}", input_text="What is 17*23?"
    )
    handle = await client.submit(request)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with client, httpx.AsyncClient(transport=transport, base_url="http://shop") as browser:
        answer = await browser.get(f"/runs/{handle.id}/events", timeout=60)
        assert answer.status_code == 200, answer.text
        assert "event: run.completed" in answer.text
        assert "event: end" in answer.text
        missing = await browser.get("/runs/no-such-run/events")
        if OpenAgentsError in app.exception_handlers:
            assert missing.status_code == 404, missing.status_code
