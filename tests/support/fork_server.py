"""The fork server: a process that has imported the library, and forks the processes that tests start.

Half of the processor time of a worker that lives for a second is its imports. This program does them once.
For each request it forks a process that then does what `python -m MODULE` or a script of the environment
would do, with its own arguments, environment, directory, files and session. `tests/support/processes.py`
sends the requests.

It runs as a script: it imports nothing of the tests, and starts nothing that a fork would copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

MODULES = (
    "openagents_worker.cli.commands",
    "openagents_worker.celery.app",
    "openagents_worker.celery.app_advice",
    "openagents_worker.celery.bootsteps",
    "openagents_worker.dashboard.routes",
    "openagents_worker.runtime.assembly",
    "openagents_worker.llm.http_providers",
    "openagents_worker.llm.openai_chat",
    "openagents_worker.llm.scripted",
    "openagents_worker.patterns.react",
    "openagents_worker.testing.model_server",
    "celery.bin.celery",
    "celery.apps.worker",
    "celery.worker.worker",
    "celery.worker.consumer",
    "celery.concurrency.prefork",
    "kombu.matcher",
    "kombu.pidbox",
    "kombu.transport.redis",
    "httpx",
    "jsonschema",
)
"""What most processes of tests import. Whatever else they need, they import themselves.

Tests hide uvloop from some processes, so it is not here. Another version of the library may lack a module.
"""

REQUEST_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1  # of prctl(2)


def serve(control: socket.socket) -> dict[str, Any]:
    """Fork a process for each request. Returns the request in the new process; ends with the connection."""
    while True:
        data, descriptors, *_ = socket.recv_fds(control, REQUEST_BYTES, 3)
        if not data:
            os._exit(0)
        request: dict[str, Any] = json.loads(data)
        if (pid := _fork()) == 0:
            control.close()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
            for descriptor in descriptors:
                os.close(descriptor)
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        control.sendall(str(pid).encode())


def _fork() -> int:
    """Fork a process whose parent is the process of the tests, so that only they wait for it.

    The process in between ends at once; the kernel gives its child to the nearest process that has asked for
    the orphans below it (PR_SET_CHILD_SUBREAPER), which is that of the tests.
    """
    tests = os.getppid()
    reading, writing = os.pipe()
    if (between := os.fork()) == 0:
        if (pid := os.fork()) == 0:
            os.close(reading)
            os.close(writing)
            while os.getppid() != tests:
                time.sleep(0.0005)
            return 0
        os.write(writing, str(pid).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(between, 0)
    pid = int(os.read(reading, 20))
    os.close(reading)
    return pid


def become(request: dict[str, Any]) -> None:
    """Take the environment, the directory, the session and the path that a new interpreter would have."""
    if request["new_session"]:
        os.setsid()
    if request["dies_with_parent"]:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    if request["cwd"]:
        os.chdir(request["cwd"])
    first = str(Path(request["script"]).parent) if request["script"] else os.getcwd()  # noqa: PTH109
    more = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [*([] if request["safe_path"] else [first]), *map(os.path.abspath, more), *sys.path]
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    sys.argv[:] = [request["script"] or "-m", *request["arguments"]]
    sys.stdin, sys.stdout, sys.stderr = (
        _reader(),
        _writer(1, sys.stdout.errors),
        _writer(2, sys.stderr.errors),
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def _reader() -> io.TextIOWrapper:
    raw: Any = open(0, "rb", closefd=False)  # noqa: SIM115 - for the life of the process
    found = io.TextIOWrapper(raw, "utf-8", sys.stdin.errors)
    found.mode = "r"  # type: ignore[attr-defined]  # as Python does
    return found


def _writer(descriptor: int, errors: str | None) -> io.TextIOWrapper:
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    by_line = not unbuffered and (descriptor == 2 or os.isatty(descriptor))
    raw: Any = open(descriptor, "wb", 0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    found = io.TextIOWrapper(raw, "utf-8", errors, line_buffering=by_line, write_through=unbuffered)
    found.mode = "w"  # type: ignore[attr-defined]  # as Python does
    return found


def run(request: dict[str, Any]) -> None:
    """Do what the interpreter does with its arguments, in the module `__main__`."""
    main, run_module, script = vars(sys.modules["__main__"]), runpy._run_module_as_main, request["script"]  # type: ignore[attr-defined]
    code = compile(Path(script).read_bytes(), script, "exec") if script else None
    for name in [name for name in main if not name.startswith("__")]:
        del main[name]
    if code is None:
        run_module(request["module"])  # what `python -m` calls
    else:
        main["__file__"] = script
        exec(code, main)  # noqa: S102 - a script of this environment


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file
    _library = sys.argv[2]
    sys.path.insert(0, _library)
    for _module in MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(_module)
    sys.path.remove(_library)
    gc.collect()
    gc.freeze()
    _control = socket.socket(fileno=int(sys.argv[1]))
    _control.sendall(b"ready")
    _request = serve(_control)
    become(_request)
    run(_request)
