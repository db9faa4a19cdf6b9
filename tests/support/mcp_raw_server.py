"""An MCP server over stdio that answers one method with any bytes.

`python mcp_raw_server.py FILE`: the first line of FILE is the method, the rest is what is sent in answer to
it, with the id of the request in place of `ID`. Every other request gets a valid answer. It uses the standard
library only, so that it starts in milliseconds.
"""

from __future__ import annotations

import json
import sys

LOOK = {"name": "look", "description": "Looks.", "inputSchema": {"type": "object"}}
SERVER = {"name": "raw", "version": "1"}


def answer(method: str, params: dict[str, object]) -> dict[str, object]:
    match method:
        case "initialize":
            return {
                "protocolVersion": params["protocolVersion"],
                "capabilities": {"tools": {}},
                "serverInfo": SERVER,
            }
        case "tools/list":
            return {"tools": [{**LOOK, "annotations": {"readOnlyHint": True}}]}
        case "tools/call":
            return {"content": [{"type": "text", "text": "seen"}]}
    return {}


def main() -> None:
    with open(sys.argv[1], "rb") as file:  # noqa: PTH123 - importing pathlib takes longer than all the rest
        special, _, raw = file.read().partition(b"\n")
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if "id" not in message:
            continue
        id_ = json.dumps(message["id"]).encode()
        if message["method"] == special.decode():
            sent = raw.replace(b"ID", id_)
        else:
            reply = {
                "jsonrpc": "2.0",
                "id": message["id"],
                "result": answer(message["method"], message["params"]),
            }
            sent = json.dumps(reply).encode()
        sys.stdout.buffer.write(sent + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
