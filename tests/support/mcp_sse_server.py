"""An MCP server with faults, over the older transport with Server-Sent Events.

Real: the protocol, the process and the sockets. The tools are those of `mcp_server.py`. A client opens a
stream with GET, and sends its messages with POST to the address that the first event of the stream names.
`python mcp_sse_server.py LOG PORT` serves HTTP.
"""

from __future__ import annotations

import json
import os
import queue
import sys
from http.server import ThreadingHTTPServer
from itertools import count

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - as in mcp_server.py

from mcp_server import Handler, answer, log  # type: ignore[import-not-found]  # it has no package

streams: dict[str, queue.Queue[bytes | None]] = {}
numbers = count(1)


class Messages:
    """The stream of a client, as a file to which whole lines of JSON are written."""

    def __init__(self, stream: queue.Queue[bytes | None]) -> None:
        self._stream = stream

    def write(self, line: bytes) -> None:
        self._stream.put(b"event: message\ndata: " + line.strip() + b"\n\n")

    def flush(self) -> None:
        """Each line is sent at once."""


class SseHandler(Handler):  # type: ignore[misc]  # see above
    def do_GET(self) -> None:
        """The stream of a session. None in its queue ends it, without the answers that are missing."""
        session = f"s{next(numbers)}"
        stream = streams[session] = queue.Queue()
        log("stream", session=session)
        self.send(200, None, {"content-type": "text/event-stream"})
        self.send_piece(b"event: endpoint\ndata: /messages?session_id=" + session.encode() + b"\n\n")
        while (event := stream.get()) is not None:
            self.send_piece(event)
        self.close_connection = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        session = self.path.rpartition("session_id=")[2]
        if session not in streams:
            self.send(405, b"")
            return
        message, stream = json.loads(body), streams[session]
        status = self.faulty_status(message)
        if status is not None:
            self.send(status, b"no")
            return
        self.send(202, b"")
        out = Messages(stream)
        reply = answer(message, out)
        form = ((message.get("params") or {}).get("arguments") or {}).get("form")
        if form == "end of stream" and len(streams) == 1:
            stream.put(None)
        elif reply is not None:
            out.write(json.dumps(reply).encode())


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), SseHandler)
    log("listening", port=server.server_address[1])
    server.serve_forever()


if __name__ == "__main__":
    main()
