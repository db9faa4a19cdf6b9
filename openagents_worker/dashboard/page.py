"""Base of our pages. The only place that guards a request to a page, and turns errors into pages."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import quote

from flower.views import BaseHandler
from tornado import web

from openagents_worker.dashboard import shown_text
from openagents_worker.dashboard.access import is_from_own_page
from openagents_worker.errors import OpenAgentsError, RequestInvalid
from openagents_worker.jsontext import loads
from openagents_worker.models import RunState
from openagents_worker.producer.client import AsyncClient

__all__ = ["ActionHandler", "PageHandler"]

MAX_FIELD_CHARS = 100_000  # of one field of a form
MAX_TEXT_CHARS = 600  # of a filter: a label has a name and a value
ANONYMOUS = "flower"
"""Who decides, in the events of a run, if Flower has no password."""

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Nothing is loaded from elsewhere, no script is part of a page, and no other site may frame a page."""

TONE_OF = {
    RunState.COMPLETED: "good",
    RunState.FAILED: "bad",
    RunState.CANCELLED: "off",
    RunState.RUNNING: "busy",
    RunState.QUEUED: "idle",
    RunState.SCHEDULED: "idle",
    RunState.WAITING_SESSION: "idle",
}
"""The colour of a state. A parked run needs attention."""


class PageHandler(BaseHandler):  # type: ignore[misc]  # Flower has no types
    """A page for users who are logged in, if Flower has a password."""

    tab = "runs"

    @property
    def client(self) -> AsyncClient:
        client: AsyncClient = self.application.client
        return client

    def set_default_headers(self) -> None:
        """Without the header with which Flower allows other sites to read a page."""
        for name, value in HEADERS.items():
            self.set_header(name, value)

    @web.authenticated
    def prepare(self) -> None:
        """Refuses a user who is not logged in."""

    def show(self, template: str, **values: Any) -> None:
        """Render one of our templates."""
        self.render(
            f"openagents/{template}",
            **values,
            tab=self.tab,
            can_act=not self.application.options.read_only,
            run_path=self.run_path,
            session_path=self.session_path,
            tone_of=lambda state: TONE_OF.get(state, "wait"),
            shown=shown_text,
        )

    def run_path(self, run_id: str, action: str = "") -> str:
        """The path of the page of a run, or of an action on it."""
        path = f"{self.prefix}/run/{quote(run_id, safe='')}"
        return f"{path}/{action}" if action else path

    def session_path(self, session_id: str) -> str:
        """The path of the page of a session."""
        return f"{self.prefix}/session/{quote(session_id, safe='')}"

    @property
    def prefix(self) -> str:
        """The beginning of every path: Flower's option `url_prefix`."""
        prefix = (self.application.options.url_prefix or "").strip("/")
        return f"/{prefix}" if prefix else ""

    def query(self, name: str) -> str | None:
        """A parameter of the URL. None if it is missing or empty."""
        text = str(self.get_query_argument(name, "")).strip()
        if len(text) > MAX_TEXT_CHARS:
            raise RequestInvalid(f"{name} has {len(text):,} characters; at most {MAX_TEXT_CHARS} are allowed")
        return text or None

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """An error with a code is an answer, not a fault of the server."""
        if not isinstance(value, OpenAgentsError):
            super().log_exception(typ, value, tb)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """The page about an error: what happened, and what to do. Without a traceback of this server."""
        error = kwargs.get("exc_info", (None, None))[1]
        if status_code == 401:
            super().write_error(status_code, **kwargs)
            return
        if not hasattr(self, "_current_user"):
            self.current_user = None
        code, message, hint = (
            "http",
            "the server could not make this page",
            "the log of Flower has the reason",
        )
        if isinstance(error, OpenAgentsError):
            status_code = error.http_status
            code, message, hint = error.code, error.message, error.hint or ""
        elif isinstance(error, web.HTTPError):
            message, hint = error.log_message or self._reason, ""
        self.set_status(status_code)
        back = self.request.path.rpartition("/")[0] if self.request.method == "POST" else ""
        self.show("problem.html", code=code, message=message, hint=hint, status=status_code, back=back)


class ActionHandler(PageHandler):
    """Something that a user does: a POST from one of our pages, unless Flower is read-only."""

    def check_xsrf_cookie(self) -> None:
        """Refuses a request from another site, with and without a password.

        Flower's own check allows every site if Flower has no password.
        """
        if not is_from_own_page(self.request.headers, self.request.host):
            raise web.HTTPError(403, "this request comes from another site, not from a page of this Flower")

    @web.authenticated
    def prepare(self) -> None:
        """Refuses a user who is not logged in, and everybody if Flower is read-only."""
        self.check_xsrf_cookie()
        if self.application.options.read_only:
            raise web.HTTPError(403, "this Flower is read-only; FLOWER_READ_ONLY=0 enables actions")

    @property
    def user(self) -> str:
        """Who acts, for the events of the run: the user's name or address."""
        if self.application.options.auth:
            return str(self.current_user)
        header = self.request.headers.get("Authorization", "")
        try:
            name = base64.b64decode(header.partition(" ")[2]).decode().partition(":")[0]
        except (binascii.Error, UnicodeDecodeError):
            name = ""
        return name or ANONYMOUS

    def field(self, name: str) -> str | None:
        """A field of the form. None if it is missing or empty."""
        text = str(self.get_body_argument(name, "", strip=False)).replace("\r\n", "\n")
        if len(text) > MAX_FIELD_CHARS:
            raise RequestInvalid(
                f"{name} has {len(text):,} characters; at most {MAX_FIELD_CHARS:,} are allowed"
            )
        return text if text.strip() else None

    def needed(self, name: str) -> str:
        """A field that must not be empty. Raises `RequestInvalid`."""
        text = self.field(name)
        if text is None:
            raise RequestInvalid(f"{name} is empty", hint=f"fill in the field {name}")
        return text

    def json_field(self, name: str) -> Any:
        """A field with JSON, decoded; None if it is empty. Raises `RequestInvalid`."""
        text = self.field(name)
        if text is None:
            return None
        try:
            return loads(text)
        except ValueError as error:
            raise RequestInvalid(
                f"{name} is not valid JSON: {error}", hint='a text needs quotes, as in "yes"'
            ) from None


def no_page(what: str) -> NoReturn:
    """Answer with 404."""
    raise web.HTTPError(404, what)


def with_values(path: str, values: Mapping[str, str | None]) -> str:
    """The path with these parameters; those without a value are left out."""
    pairs = "&".join(f"{name}={quote(value, safe='')}" for name, value in values.items() if value)
    return f"{path}?{pairs}" if pairs else path
