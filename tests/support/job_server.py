"""A service with jobs. Real: its HTTP server, which counts requests. A test says how the jobs go on."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class JobServer:
    """`POST /jobs` starts a job, `GET /jobs/ID` says its state, `DELETE /jobs/ID` cancels it.

    `GET /keys/KEY` finds a job by the idempotency key with which it was started.
    """

    url: str = ""
    started: list[str] = field(default_factory=list)
    """The idempotency keys of the requests that started a job, in order."""
    asked: int = 0
    cancelled: list[str] = field(default_factory=list)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The states of the jobs by id."""
    ends_after: int | None = None
    """The number of questions after which a job has succeeded, unless its key begins with `endless`. None: a
    test ends it."""
    refuses: list[int] = field(default_factory=list)
    """The HTTP status of the next answers to questions."""
    refuses_to_cancel: int = 0
    """How many of the next cancellations get the status 503."""

    def end(self, status: str = "succeeded", **fields: Any) -> None:
        """End all jobs in this state."""
        for job in self.jobs.values():
            job.update(status=status, **fields)

    def answer(self, method: str, path: str, key: str) -> tuple[int, Any]:
        kind, _, name = unquote(path).strip("/").partition("/")
        if method == "POST":
            self.started.append(key)
            job_id = f"job-{len(self.started)}"
            self.jobs[job_id] = {"job_id": job_id, "key": key, "status": "running", "poll_after_ms": 100}
            return 201, self.jobs[job_id]
        if kind == "keys":
            found = [job for job in self.jobs.values() if job["key"] == name]
            return (200, found[0]) if found else (404, {})
        if name not in self.jobs:
            return 404, {}
        if method == "DELETE":
            if self.refuses_to_cancel:
                self.refuses_to_cancel -= 1
                return 503, {}
            self.cancelled.append(name)
            self.jobs[name]["status"] = "cancelled"
            return 200, self.jobs[name]
        self.asked += 1
        if self.refuses:
            return self.refuses.pop(0), {}
        job = self.jobs[name]
        job["asked"] = job.get("asked", 0) + 1
        if self.ends_after is not None and job["asked"] >= self.ends_after and job["key"][:7] != "endless":
            job.update(status="succeeded", result={"film": name})
        return 200, job


@contextmanager
def job_server(**fields: Any) -> Generator[JobServer]:
    """A server on a free port."""
    service = JobServer(**fields)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                status, value = service.answer(
                    self.command, self.path, self.headers.get("Idempotency-Key") or ""
                )
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = do

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, name="job server")
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
