"""Options for Flower. The only place that says what stands in a run's row, and when Flower's buttons work.

A Flower configuration file takes them by name:

    from openagents_worker.dashboard.flower_options import format_task, tasks_columns
"""

from __future__ import annotations

import ast
import ipaddress
import os
import re
from typing import Any
from urllib.parse import urlsplit

__all__ = ["control_from_this_machine", "format_task", "is_this_machine", "tasks_columns"]

tasks_columns = "args,state,exception,uuid,received,runtime,worker,name"
"""`args` names agent, session and run; `exception` says why a run waits, or how it failed."""

RUN_TASKS = ("tasks.run_agent", "tasks.resume_run")
WITH_REASON = ("RETRY", "FAILURE", "REVOKED")
# As Celery shows them: RunFailed('llm.response: …'), Retry(Retry(...), 'llm.rate_limit', 60.0)
_RAISED = re.compile(
    r"""^\w+\(\s*(?:Retry\(\.\.\.\),\s*)?(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", re.DOTALL
)
_RETRIED = re.compile(r"^Retry\(.*,\s*(?P<delay_s>\d+(?:\.\d+)?)\)$", re.DOTALL)


def format_task(task: Any) -> Any:
    """A task as Flower shows it: of a run the reason in plain words, and only while it holds.

    Celery keeps what a task was retried for when it has succeeded since.
    """
    if task.name in RUN_TASKS:
        task.exception = _reason(str(task.exception or "")) if task.state in WITH_REASON else None
    return task


def _reason(shown: str) -> str:
    """What was raised, without the repr around it; of a retry also after how long it is tried again."""
    found = _RAISED.match(shown)
    text = found["text"] if found else shown
    try:
        reason = str(ast.literal_eval(text)) if text[:1] in ("'", '"') else text
    except (SyntaxError, ValueError):
        return shown
    delay = _RETRIED.search(shown)
    return f"{reason}, again after {float(delay['delay_s']):g} s" if delay else reason


def is_this_machine(host: str) -> bool:
    """Whether a host is this machine and no other can reach it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def control_from_this_machine() -> None:
    """Let Flower's buttons work without a password, for a Flower that listens on this machine only.

    Flower's buttons call its API, which answers nobody unless there is a password or its users may be
    unknown. In the second case any web page that its user visits could call it too, so requests of other
    sites are refused here.
    """
    from flower import views
    from tornado.web import HTTPError

    os.environ["FLOWER_UNAUTHENTICATED_API"] = "1"
    set_default_headers = views.BaseHandler.set_default_headers

    def without_cors(handler: Any) -> None:
        set_default_headers(handler)
        for name in ("Origin", "Headers", "Methods"):
            handler.clear_header(f"Access-Control-Allow-{name}")

    def refuse_other_sites(handler: Any) -> None:
        headers = handler.request.headers
        site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
        is_ours = site in (None, "same-origin", "none") and (
            origin is None or urlsplit(origin).netloc == handler.request.host
        )
        # A name that somebody else has made to point here is no name of this machine.
        if not (is_ours and is_this_machine(urlsplit(f"//{handler.request.host}").hostname or "")):
            raise HTTPError(403, "this request comes from another site")

    views.BaseHandler.set_default_headers = without_cors
    views.BaseHandler.check_xsrf_cookie = refuse_other_sites
