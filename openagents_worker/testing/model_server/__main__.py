"""The model server as a process: the only place that reads its command line."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openagents_worker.errors import OpenAgentsError, PluginConfigError
from openagents_worker.local.child_process import die_with_parent
from openagents_worker.testing.model_server.server import ModelServer, ReplyFunction


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m openagents_worker.testing.model_server")
    parser.add_argument("--script", required=True, help="a JSON file with entries, or module:function")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free port")
    parser.add_argument("--log", type=Path, help="a file that gets one JSON line per event")
    parser.add_argument("--latency-ms", type=int, default=0)
    parser.add_argument("--token-delay-ms", type=int, default=0)
    parser.add_argument(
        "--die-with-parent", action="store_true", help="end together with the starting thread"
    )
    options = parser.parse_args(arguments)
    try:
        if options.die_with_parent:
            die_with_parent()
        server = ModelServer(
            _load_reply(options.script),
            port=options.port,
            host=options.host,
            latency_ms=options.latency_ms,
            token_delay_ms=options.token_delay_ms,
            log_path=options.log,
        )
        asyncio.run(_serve_until_signal(server))
    except (OpenAgentsError, OSError) as error:
        parser.exit(1, f"{error}\n")


async def _serve_until_signal(server: ModelServer) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with server:
        print(server.url, flush=True)
        await stopping.wait()


def _load_reply(script: str) -> ReplyFunction | list[Mapping[str, Any]]:
    path = Path(script)
    if path.suffix == ".json" or path.is_file():
        entries = json.loads(path.read_text("utf-8"))
        if not isinstance(entries, list):
            raise PluginConfigError(
                f"{script}: a script must be a list of entries, not {type(entries).__name__}"
            )
        return entries
    module, colon, name = script.partition(":")
    if not colon:
        raise PluginConfigError(f"{script} is neither an existing file nor module:function")
    function: ReplyFunction = getattr(importlib.import_module(module), name)
    return function


if __name__ == "__main__":
    main()
