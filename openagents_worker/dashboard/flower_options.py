"""Options for Flower. The only place that defines how a run is shown and when Flower's buttons work.

A Flower configuration file imports them:

    from openagents_worker.dashboard.flower_options import format_task, tasks_columns
"""

from __future__ import annotations

import ast
import ipaddress
import os
import re
from typing import Any
from urllib.parse import urlsplit

__all__ = [
    "control_from_this_machine",
    "format_task",
    "is_false",
    "is_this_machine",
    "is_true",
    "tasks_columns",
]

tasks_columns = "args,state,exception,uuid,received,runtime,worker,name"
"""`args` contains agent, session and run. `exception` contains why a run waits or why it failed."""

RUN_TASKS = ("tasks.run_agent", "tasks.resume_run")
STATES_WITH_REASON = ("RETRY", "FAILURE", "REVOKED")
# Celery shows the repr: RunFailed('llm.response: …'), Retry(Retry(...), 'llm.rate_limit', 60.0)
_EXCEPTION = re.compile(
    r"""^\w+\(\s*(?:Retry\(\.\.\.\),\s*)?(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", re.DOTALL
)
_RETRIED = re.compile(r"^Retry\(.*,\s*(?P<delay_s>\d+(?:\.\d+)?)\)$", re.DOTALL)


def format_task(task: Any) -> Any:
    """Prepare a task for Flower: for a run, replace the repr of its exception by the reason in plain words.

    A run that has succeeded gets no reason. Celery keeps the reason of an earlier retry.
    """
    if task.name in RUN_TASKS:
        task.exception = _reason(str(task.exception or "")) if task.state in STATES_WITH_REASON else None
    return task


def _reason(exception: str) -> str:
    """The message of an exception, without the repr around it; for a retry also its delay."""
    found = _EXCEPTION.match(exception)
    text = found["text"] if found else exception
    try:
        reason = str(ast.literal_eval(text)) if text[:1] in ("'", '"') else text
    except (SyntaxError, ValueError):
        return exception
    delay = _RETRIED.search(exception)
    return f"{reason}, retry after {float(delay['delay_s']):g} s" if delay else reason


def is_true(value: str) -> bool:
    """Whether a variable with this value switches an option of Flower on."""
    return value.strip().lower() in ("1", "true", "t", "yes", "y", "on")


def is_false(value: str) -> bool:
    """Whether a variable with this value switches an option of Flower off. Any other text does not."""
    return value.strip().lower() in ("0", "false", "f", "no", "n", "off")


def is_this_machine(host: str) -> bool:
    """Whether `host` is a loopback address or `localhost`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def control_from_this_machine() -> None:
    """Enable Flower's buttons without a password, for a Flower that listens on this machine only.

    The buttons call Flower's API. It requires a password unless unauthenticated access is allowed. With
    unauthenticated access, any web page in the user's browser could call the API. Therefore requests from
    other sites are rejected here.
    """
    from flower import views
    from tornado.web import HTTPError

    os.environ["FLOWER_UNAUTHENTICATED_API"] = "1"
    set_default_headers = views.BaseHandler.set_default_headers

    def without_cors(handler: Any) -> None:
        set_default_headers(handler)
        for name in ("Origin", "Headers", "Methods"):
            handler.clear_header(f"Access-Control-Allow-{name}")

    def reject_other_sites(handler: Any) -> None:
        headers = handler.request.headers
        site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
        is_same_site = site in (None, "same-origin", "none") and (
            origin is None or urlsplit(origin).netloc == handler.request.host
        )
        # Any domain can be made to resolve to 127.0.0.1 (DNS rebinding), so the host must be a local name.
        if not (is_same_site and is_this_machine(urlsplit(f"//{handler.request.host}").hostname or "")):
            raise HTTPError(403, "this request comes from another site")

    views.BaseHandler.set_default_headers = without_cors
    views.BaseHandler.check_xsrf_cookie = reject_other_sites
