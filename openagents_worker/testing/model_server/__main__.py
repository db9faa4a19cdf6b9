"""The server as a process: the only place that reads its command line."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openagents_worker.errors import OpenAgentsError, PluginConfigError
from openagents_worker.testing.model_server.server import ModelServer, ReplyFunction


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m openagents_worker.testing.model_server")
    parser.add_argument("--script", required=True, help="a JSON file with entries, or module:function")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--log", type=Path, help="a file that gets one JSON line per event")
    parser.add_argument("--latency-ms", type=int, default=0)
    parser.add_argument("--token-delay-ms", type=int, default=0)
    parser.add_argument("--die-with-parent", action="store_true", help="end with the thread that started us")
    options = parser.parse_args(arguments)
    try:
        if options.die_with_parent:
            _die_with_parent()
        server = ModelServer(
            _load_reply(options.script),
            port=options.port,
            host=options.host,
            latency_ms=options.latency_ms,
            token_delay_ms=options.token_delay_ms,
            log_path=options.log,
        )
        asyncio.run(_serve_until_told(server))
    except (OpenAgentsError, OSError) as error:
        parser.exit(1, f"{error}\n")


async def _serve_until_told(server: ModelServer) -> None:
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    async with server:
        print(server.url, flush=True)
        await told.wait()


def _load_reply(script: str) -> ReplyFunction | list[Mapping[str, Any]]:
    path = Path(script)
    if path.suffix == ".json" or path.is_file():
        entries = json.loads(path.read_text("utf-8"))
        if not isinstance(entries, list):
            raise PluginConfigError(f"{script}: a script is a list of entries, not {type(entries).__name__}")
        return entries
    module, colon, name = script.partition(":")
    if not colon:
        raise PluginConfigError(f"{script} is neither a file nor module:function")
    function: ReplyFunction = getattr(importlib.import_module(module), name)
    return function


def _die_with_parent() -> None:
    """Have the kernel end this process with its parent, also when that is killed."""
    if sys.platform != "linux":
        raise PluginConfigError("--die-with-parent needs Linux")
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent or parent == 1:  # it died before the kernel knew
        sys.exit(1)


if __name__ == "__main__":
    main()
