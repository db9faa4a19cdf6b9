"""An MCP server with faults, over stdio and streamable HTTP.

Real: the protocol, the process, the pipes and the sockets. It uses the standard library only, so that it
starts in milliseconds and can send what no SDK would send. `python mcp_server.py LOG` serves stdio, `python
mcp_server.py LOG PORT` serves HTTP. It writes what happens to LOG, a line of JSON for each.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LOG = sys.argv[1] if len(sys.argv) > 1 else os.devnull
NO_ARGUMENTS = {"type": "object", "properties": {}}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
hidden: set[str] = set()
added: list[str] = []


def log(what: str, **fields: Any) -> None:
    with open(LOG, "a") as file:  # noqa: PTH123 - one write, also from several processes
        file.write(json.dumps({"what": what, "pid": os.getpid(), **fields}) + "\n")


def has_happened(what: str) -> bool:
    with open(LOG) as file:  # noqa: PTH123 - see above
        return any(json.loads(line)["what"] == what for line in file if line.endswith("\n"))


def tool(name: str, schema: Any = None, **annotations: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"name": name, "description": f"Does {name}."}
    described["inputSchema"] = schema or NO_ARGUMENTS
    return described | ({"annotations": annotations} if annotations else {})


def tools() -> list[dict[str, Any]]:
    numbers = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    found = [
        tool("add", numbers | {"required": ["a", "b"]}, readOnlyHint=True),
        tool("take.note", {"type": "object", "properties": {"text": {"type": "string"}}}),
        tool("put", idempotentHint=True, destructiveHint=False),
        tool("wipe", destructiveHint=True),
        tool("bad_schema", {"type": "object", "$ref": "https://example.com/schema"}),
        *(
            tool(name)
            for name in (
                "die",
                "garbage",
                "invalid",
                "fail",
                "env",
                "blocks",
                "change",
                "spawn",
                "quit",
                "noisy",
                "flood",
                "numbers",
            )
        ),
        *(tool(name, readOnlyHint=True) for name in ("look_and_die", "hang", "huge", "slow", "half")),
        *map(tool, added),
    ]
    return [each for each in found if each["name"] not in hidden]


def further_tools() -> list[dict[str, Any]]:
    """As many tools as the environment asks for, with a description of as many characters."""
    number, size = (int(os.environ.get(name, "0")) for name in ("FURTHER", "SIZE"))
    return [{**tool(f"further_{n}"), "description": "x" * size} for n in range(number)]


def odd_tools() -> list[Any]:
    """Tools of which only some can be used, and a name that is listed twice."""
    deep: dict[str, Any] = {}
    for _ in range(80):
        deep = {"properties": {"a": deep}}
    number = {"type": "object", "properties": {"a": {"default": float("nan")}}}
    return [
        tool("add", {"type": "object", "title": "the first one"}, readOnlyHint=True),
        tool("add", {"type": "object", "title": "the second one"}),
        tool("x" * 300),
        tool("nan", number),
        tool("deep", deep),
        tool("a_text", "no schema"),
        {"name": "any", "inputSchema": {"type": "object", "properties": {"x": True}}, "icons": 7},
        {"name": "no_type", "inputSchema": {"properties": {}}, "annotations": {"readOnlyHint": "yes"}},
        {"name": "no_schema", "outputSchema": 7},
        {"name": 7},
        {"title": "without a name"},
        "a text",
    ]


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": value}], **more}


def blocks() -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": "a pixel"},
        {"type": "image", "data": PIXEL, "mimeType": "image/png"},
        {"type": "resource", "resource": {"uri": "note://1", "mimeType": "text/plain", "text": "one"}},
        {"type": "resource_link", "uri": "note://2", "name": "two"},
    ]


def wait_for_go() -> None:
    while not os.path.exists(f"{LOG}.go"):  # noqa: PTH110 - the standard library's fastest
        time.sleep(0.005)


def say_changed_later(out: Any) -> None:
    wait_for_go()
    say_changed(out)


def say_changed(out: Any) -> None:
    out.write(json.dumps({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"}).encode() + b"\n")
    out.flush()


def call(name: str, arguments: dict[str, Any], params: dict[str, Any], out: Any) -> Any:
    key = (params.get("_meta") or {}).get("openagents-worker/idempotencyKey")
    log("call", tool=name, key=key, arguments=arguments)
    if name not in {each["name"] for each in tools()}:
        return text(f"Unknown tool: {name}", isError=True)
    match name:
        case "add":
            total = arguments["a"] + arguments["b"]
            return text(str(total), structuredContent={"sum": total})
        case "die" | "look_and_die":
            if not has_happened("died"):
                log("died")
                os._exit(3)
            return text("survived")
        case "quit":
            threading.Timer(0.02, os._exit, (0,)).start()
            return text("bye")
        case "hang":
            return None
        case "slow":
            wait_for_go()
            return text("went")
        case "garbage":
            out.write(b"Listening on stdio...\n{not json\n")
            return text("after garbage")
        case "noisy":
            for number in range(500):
                print(f"line {number}", file=sys.stderr)
            sys.stderr.flush()
            return text("quiet again")
        case "half":
            return text("cut in an emoji: \ud83d")
        case "numbers":
            odd = {"nan": float("nan"), "infinite": [float("-inf")], "large": 10**30, "many": 10**4000}
            return text("7", structuredContent=odd)
        case "flood":
            for _ in range(arguments["lines"]):
                out.write(b"debug\n")
            return text("done")
        case "huge":
            return text("x" * (9 * 1024 * 1024))
        case "fail":
            return text("the disk is full, token sk-abcdefgh12345678", isError=True)
        case "env":
            return text(json.dumps(dict(os.environ)))
        case "invalid":
            return {"content": [{"type": "text"}]}
        case "blocks":
            return {"content": blocks()}
        case "change":
            hidden.add("put")
            added.append("brand_new")
            if arguments.get("later"):
                threading.Thread(target=say_changed_later, args=(out,), daemon=True).start()
            else:
                say_changed(out)
            return text("changed")
        case "spawn":
            child = subprocess.Popen(["sleep", "600"], start_new_session=True)
            return text(str(child.pid))
    return text(f"{name} is done")


def answer(message: dict[str, Any], out: Any) -> dict[str, Any] | None:
    """The answer to a message; None if there is none."""
    method, params = message.get("method"), message.get("params") or {}
    if "id" not in message:
        log("notification", method=method, params=params)
        return None
    reply: dict[str, Any] = {"jsonrpc": "2.0", "id": message["id"]}
    match method:
        case "initialize" if "MODERN" in os.environ:
            reply["error"] = {"code": -32601, "message": "Method not found"}
        case "server/discover" if "MODERN" in os.environ:
            reply["result"] = {"supportedVersions": ["2026-07-28"], "capabilities": {"tools": {}}}
        case "initialize":
            capabilities = {"tools": {"listChanged": True}, "resources": {}, "prompts": {}}
            info = {"name": "faulty", "version": "1"}
            reply["result"] = {"protocolVersion": params["protocolVersion"], "capabilities": capabilities}
            reply["result"]["serverInfo"] = info
        case "tools/list" if "ENDLESS" in os.environ:
            log("list")
            reply["result"] = {"tools": odd_tools(), "nextCursor": "again"}
        case "tools/list":
            log("list")
            if "CHANGES" in os.environ:
                say_changed(out)
            page, size = int(params.get("cursor") or 0), int(os.environ.get("PAGE", "10"))
            found = tools() + further_tools()
            reply["result"] = {"tools": found[page : page + size]}
            if page + size < len(found):
                reply["result"]["nextCursor"] = str(page + size)
        case "tools/call":
            result = call(params["name"], params.get("arguments") or {}, params, out)
            if result is None:
                return None
            reply["result"] = result
        case "resources/list":
            reply["result"] = {"resources": [{"uri": "note://1", "name": "one"}]}
        case "resources/read":
            contents = [{"uri": params["uri"], "text": f"content of {params['uri']}"}]
            reply["result"] = {"contents": contents}
        case "prompts/list":
            reply["result"] = {"prompts": [{"name": "greet", "arguments": [{"name": "who"}]}]}
        case "prompts/get":
            message_text = f"Greet {params['arguments']['who']}."
            content = {"type": "text", "text": message_text}
            reply["result"] = {"messages": [{"role": "user", "content": content}]}
        case "ping":
            reply["result"] = {}
        case _:
            reply["error"] = {"code": -32601, "message": f"no method {method}"}
    if "MODERN" in os.environ and "result" in reply:
        reply["result"] |= {"resultType": "complete", "ttlMs": 0, "cacheScope": "private"}
    return reply


def serve_stdio() -> None:
    out = sys.stdout.buffer
    lock = threading.Lock()

    def handle(message: dict[str, Any]) -> None:
        reply = answer(message, out)
        with lock:
            if reply is not None:
                out.write(json.dumps(reply).encode() + b"\n")
            out.flush()

    for line in sys.stdin.buffer:
        threading.Thread(target=handle, args=(json.loads(line),), daemon=True).start()
    log("end")


class Handler(BaseHTTPRequestHandler):
    """Streamable HTTP with one JSON answer for each POST."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        message = json.loads(body)
        params = message.get("params") or {}
        seen = {name: self.headers.get(name) for name in ("authorization", "accept-encoding")}
        log("post", method=message.get("method"), token=seen["authorization"], headers=seen)
        status = self.faulty_status(message)
        if status is not None:
            self.send(status, b"no")
            return
        reply = answer(message, self.wfile)
        if reply is not None and (form := (params.get("arguments") or {}).get("form")):
            self.send_in_form(form, json.dumps(reply).encode())
        elif reply is None:
            self.send(202, b"")
        else:
            self.send(200, json.dumps(reply).encode(), {"mcp-session-id": f"s{os.getpid()}"})

    def faulty_status(self, message: dict[str, Any]) -> int | None:
        """The status that the arguments of a call ask for, once; or that the test asks for a method."""
        wanted = f"{LOG}.{str(message.get('method')).replace('/', '_')}"
        if os.path.exists(wanted):  # noqa: PTH110 - as above
            with open(wanted) as file:  # noqa: PTH123 - as above
                status = int(file.read())
            os.remove(wanted)  # noqa: PTH107 - as above
            return status
        arguments = (message.get("params") or {}).get("arguments") or {}
        if "status" not in arguments or has_happened(f"status {arguments['status']}"):
            return None
        log(f"status {arguments['status']}")
        if arguments.get("executes"):
            log("call", tool=message["params"]["name"], arguments=arguments)
        return int(arguments["status"])

    def do_GET(self) -> None:
        self.send(405, b"")

    def do_DELETE(self) -> None:
        log("end")
        self.send(200, b"")

    def send_in_form(self, form: str, reply: bytes) -> None:
        """Send the answer to a call in the form that its arguments ask for."""
        events = {"content-type": "text/event-stream"}
        match form:
            case "event":
                self.send(200, b"data: " + reply + b"\n\n", events)
            case "no event":  # as a server does that is restarted
                self.send(200, b": nothing\n\n", events)
            case "gzip":
                self.send(200, gzip.compress(reply + b" " * (16 * 1024 * 1024)), {"content-encoding": "gzip"})
            case "empty lines":
                self.send(200, b"\n\n" * (5 * 1024 * 1024) + reply)
            case "events in pieces":  # none of the pieces contains an empty line
                self.send(200, None, events)
                for _ in range(9):
                    self.send_piece(b": " + b"x" * (1024 * 1024) + b"\n")
                    self.send_piece(b"\n")
                self.send_piece(b"data: " + reply + b"\n\n")
                self.send_piece(b"")

    def send_piece(self, piece: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.flush()

    def send(self, status: int, body: bytes | None, headers: Any = None) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if status == 429:
            self.send_header("retry-after", "3")
        if body is None:
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
        else:
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Not to stderr."""


def main() -> None:
    log("start")
    print("a line on stderr with sk-abcdefgh12345678", file=sys.stderr, flush=True)
    if len(sys.argv) > 2:
        server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
        log("listening", port=server.server_address[1])
        server.serve_forever()
    else:
        serve_stdio()


if __name__ == "__main__":
    main()
