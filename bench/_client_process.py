"""A model client in a process of its own. The only place that starts `_llm_clients.py` and asks it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAM = Path(__file__).parent / "_llm_clients.py"


class ClientProcess:
    """A process with one of the clients of `_llm_clients.py`."""

    def __init__(self, python: str, name: str, url: str, loop: str) -> None:
        command = [python, "-P", str(PROGRAM), name, url, loop]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def measure(self, form: str, way: str, calls: int, together: int) -> tuple[float, str]:
        """The CPU time of a call in microseconds, and the text of the reply.

        `together` calls are made at the same time, `calls` times.
        """
        assert self._process.stdin is not None
        print(form, way, calls, together, file=self._process.stdin, flush=True)
        cost, text = json.loads(self._answer())
        return cost, text

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client ended with code {self._process.wait()}; see its output above")
        return line

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@contextmanager
def client_process(python: str, name: str, url: str, loop: str = "asyncio") -> Iterator[ClientProcess]:
    client = ClientProcess(python, name, url, loop)
    try:
        yield client
    finally:
        client.stop()
