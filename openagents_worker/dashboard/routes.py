"""Routes. The only place that maps paths to our pages. Flower has its own pages beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tornado.web import StaticFileHandler, url

from openagents_worker.dashboard.approvals_page import ApprovalsPage
from openagents_worker.dashboard.fleet_page import FleetPage
from openagents_worker.dashboard.overview import OverviewPage
from openagents_worker.dashboard.page import HEADERS
from openagents_worker.dashboard.run_actions import RunAction
from openagents_worker.dashboard.run_page import RunPage
from openagents_worker.dashboard.run_stream import RunStream
from openagents_worker.dashboard.runs_page import RunsPage
from openagents_worker.dashboard.sessions_page import SessionPage, SessionsPage

__all__ = ["PAGES"]


class StaticFiles(StaticFileHandler):
    """Our style sheet and our scripts."""

    def set_extra_headers(self, path: str) -> None:
        for name, value in HEADERS.items():
            if name != "Cache-Control":
                self.set_header(name, value)


PAGES: list[Any] = [
    url(r"/overview", OverviewPage, name="openagents-overview"),
    url(r"/runs", RunsPage, name="openagents-runs"),
    url(r"/run/([^/]+)", RunPage),
    url(r"/run/([^/]+)/events", RunStream),
    url(r"/run/([^/]+)/([a-z]+)", RunAction),
    url(r"/approvals", ApprovalsPage, name="openagents-approvals"),
    url(r"/sessions", SessionsPage, name="openagents-sessions"),
    url(r"/session/([^/]+)", SessionPage),
    url(r"/fleet", FleetPage, name="openagents-fleet"),
    url(
        r"/openagents-static/(.+)",
        StaticFiles,
        {"path": str(Path(__file__).parent / "static")},
        name="openagents-static",
    ),
]
