"""Flower's application with our pages, in the process of the test. Real: the HTTP server, Redis, the runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
from flower.options import default_options
from flower.urls import settings as flower_settings
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from openagents_worker.celery.app import make_worker_app
from openagents_worker.dashboard.flower_app import FlowerWithPages, flower_for
from openagents_worker.settings import load_settings

__all__ = ["Server", "serving"]


@dataclass(frozen=True)
class Server:
    """A running server. `browser` sends requests as a browser does that shows one of its pages."""

    app: FlowerWithPages
    url: str
    browser: httpx.AsyncClient

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.browser.get(path, headers=headers)

    async def post(self, path: str, headers: Mapping[str, str] | None = None, **form: str) -> httpx.Response:
        """Submit a form of one of its pages, unless `headers` says otherwise."""
        own = {"Origin": self.url, "Sec-Fetch-Site": "same-origin"} if headers is None else headers
        return await self.browser.post(path, data=form, headers=own)

    async def text(self, path: str) -> str:
        """The page, which must exist."""
        answer = await self.get(path)
        assert answer.status_code == 200, answer.text
        return answer.text


@asynccontextmanager
async def serving(
    redis_url: str, *, env: Mapping[str, str] | None = None, **options: Any
) -> AsyncIterator[Server]:
    """Serve the pages during the block, with these options of Flower."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, **(env or {})})
    celery_app = make_worker_app(settings)
    all_options = SimpleNamespace(**{**default_options.as_dict(), **options})
    app = flower_for(capp=celery_app, options=all_options, **flower_settings)
    assert isinstance(app, FlowerWithPages)
    sockets = bind_sockets(0, "127.0.0.1")
    server = HTTPServer(app)
    server.add_sockets(sockets)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=30) as browser:
            yield Server(app, url, browser)
    finally:
        server.stop()
        await server.close_all_connections()
        await app.client.close()
        celery_app.close()
