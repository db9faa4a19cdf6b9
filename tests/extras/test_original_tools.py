"""The built-in tools beside those of the original SDK's own package, which is installed in a venv of its own.

Each tool takes the same arguments and gives equal results. What differs is listed with the reason. The lists
are exact: a difference that does not exist any more fails, and so does a new one.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from openagents_worker.errors import ToolError
from openagents_worker.tools.builtin import BUILTIN_TOOLS
from tests.unit.run_fakes import FakeRun

pytestmark = [pytest.mark.extras, pytest.mark.timeout(900)]
SDK = "io-openagent-sdk>=0.4,<0.5"
PROGRAM = Path(__file__).with_name("original_tools_program.py")
ELSEWHERE = {"mcp", "remember_preference"}
"""A toolset, and a tool that needs a memory: tests/mcp and tests/runtime/test_memories.py."""
OURS_ALONE = {"save_artifact", "delegate", "transfer"}

Call = tuple[str, dict[str, Any]]

SAME: list[Call] = [
    ("builtin_search", {"query": "memory pattern session"}),
    ("builtin_search", {"query": "MEMORY", "limit": 1}),
    ("builtin_search", {"query": "xyz"}),
    ("builtin_search", {"query": ""}),
    ("calc", {"expression": "2 + 3 * 4"}),
    ("calc", {"expression": "-(7 % 4) ** 2 / 8"}),
    ("calc", {"expression": "1 / 0"}),
    ("calc", {"expression": "__import__('os')"}),
    ("current_time", {}),
    ("current_time", {"timezone": "UTC"}),
    ("date_diff", {"date1": "2024-01-01", "date2": "2024-01-15"}),
    ("date_diff", {"date1": "2024/01/01", "date2": "2024/01/02", "unit": "hours"}),
    ("date_diff", {"date1": "2024-01-01 10:00:00", "date2": "2024-01-01 10:30:00", "unit": "minutes"}),
    ("date_diff", {"date1": "2024-01-01", "date2": "2024-01-02", "unit": "seconds"}),
    ("date_diff", {"date1": "2024-01-01", "date2": "tomorrow"}),
    ("date_parse", {"date": "2024-01-15"}),
    ("date_parse", {"date": "2024-01-15 10:11:12"}),
    ("date_parse", {"date": "2024/01/15"}),
    ("date_parse", {"date": "31/12/2024"}),
    ("date_parse", {"date": "12/31/2024"}),
    ("date_parse", {"date": "January 15, 2024"}),
    ("date_parse", {"date": "Jan 15, 2024"}),
    ("date_parse", {"date": "tomorrow"}),
    ("delete_file", {"path": "FOLDER/gone.txt"}),
    ("delete_file", {"path": "FOLDER/delete.txt"}),
    ("execute_command", {"command": "echo a; echo b >&2; exit 3"}),
    ("execute_command", {"command": "true", "timeout": 20}),
    ("get_env", {"key": "TZ", "default": "x"}),
    ("get_env", {"key": "LC_MONETARY", "default": "x"}),
    ("grep_files", {"pattern": "t.o", "path": "FOLDER"}),
    ("grep_files", {"pattern": "TWO", "path": "FOLDER/a.txt", "case_sensitive": False}),
    ("grep_files", {"pattern": "(", "path": "FOLDER"}),
    ("host_lookup", {"url": "https://example.com:8080/a"}),
    ("host_lookup", {"url": "http://example.co.uk/a"}),
    ("host_lookup", {"url": "localhost"}),
    ("http_request", {"url": "SERVER/a"}),
    ("http_request", {"url": "SERVER/a", "method": "POST", "body": "a", "headers": {"X-A": "b"}}),
    ("http_request", {"url": "SERVER/a", "timeout": 9}),
    ("http_request", {"url": "SERVER/a", "method": "PUT", "body": "text"}),
    ("http_request", {"url": "SERVER/a", "method": "DELETE"}),
    ("http_request", {"url": "SERVER/a", "method": "PATCH", "body": "x"}),
    ("json_parse", {"text": '{"a": [1, null, "x"]}'}),
    ("json_parse", {"text": "[1"}),
    ("list_files", {"path": "FOLDER", "pattern": "*.txt", "recursive": False}),
    ("list_files", {"path": "FOLDER/none"}),
    ("min_max", {"numbers": [3, 1.5, 2], "action": "min"}),
    ("min_max", {"numbers": [3, 1.5, 2], "action": "max"}),
    ("min_max", {"numbers": "3, 1.5, 2", "action": "sum"}),
    ("min_max", {"numbers": [3, 1.5, 2], "action": "avg"}),
    ("min_max", {"numbers": [3, 1.5, 2, 9], "action": "median"}),
    ("min_max", {"numbers": []}),
    ("percentage", {"value": 80, "percent": 15}),
    ("percentage", {"value": 80, "percent": 25, "operation": "increase"}),
    ("percentage", {"value": 80, "percent": 25, "operation": "decrease"}),
    ("query_param", {"url": "http://a/?b=1&b=2&c=%20x", "key": "b"}),
    ("query_param", {"url": "http://a/?b=1&b=2&c=%20x", "action": "list"}),
    ("query_param", {"url": "http://a/?b=1", "key": "none"}),
    ("query_param", {"url": "http://a/?b=1"}),
    ("random_choice", {"choices": ["a"]}),
    ("random_choice", {"choices": ["a", "a"], "count": 2}),
    ("random_choice", {"choices": []}),
    ("random_int", {}),
    ("random_int", {"min": 1, "max": 6, "count": 3}),
    ("random_int", {"min": 6, "max": 1}),
    ("random_string", {}),
    ("random_string", {"length": 5, "charset": "hex"}),
    ("random_string", {"length": 0}),
    ("read_file", {"path": "FOLDER/a.txt"}),
    ("read_file", {"path": "FOLDER/none"}),
    ("set_env", {"key": "MODE", "value": "x"}),
    ("shell_exec", {"command": "echo 'a b' $HOME"}),
    ("shell_exec", {"command": ["pwd"], "cwd": "FOLDER", "timeout_ms": 5000}),
    ("shell_exec", {"command": "env", "env": {"A": "b"}}),
    ("shell_exec", {"command": ""}),
    ("shell_exec", {"command": "no-such-program"}),
    ("tavily_search", {"query": "what"}),
    ("tavily_search", {"query": "w", "max_results": 2, "include_domains": ["a.org"]}),
    ("tavily_search", {"query": "w", "search_depth": "advanced", "exclude_domains": ["a.org"]}),
    ("tavily_search", {"query": ""}),
    *(("text_transform", {"text": " Ab c ", "operation": name}) for name in
      ("upper", "lower", "title", "capitalize", "strip", "reverse", "rot13")),
    ("url_build", {"host": "a.org"}),
    ("url_build", {"scheme": "http", "host": "a.org:80", "path": "/b", "query": "d=1&e=2"}),
    ("url_build", {"host": "a.org", "path": "", "fragment": "f"}),
    ("url_build", {"host": ""}),
    ("url_parse", {"url": "https://u:p@Ex.org:80/a;b?c=d#e"}),
    ("url_parse", {"url": "a/b"}),
    ("url_parse", {"url": "http://a:99999/"}),
    ("uuid", {}),
    ("uuid", {"version": 1, "count": 2}),
    ("uuid", {"count": 0}),
    ("write_file", {"path": "FOLDER/new/b.txt", "content": "für"}),
    ("write_file", {"path": "FOLDER/a.txt", "content": "x", "mode": "a"}),
]  # fmt: skip

ECHO = "repeats an argument, which costs the model tokens"
NAMED = "has another name"
LEFT_OUT: dict[str, dict[str, str]] = {
    "calc": {"expression": ECHO},
    "date_parse": {"parsed": f"{NAMED}, `iso`, and a time zone"},
    "delete_file": {"type": "the caller knows: only with `recursive` it is a folder"},
    "grep_files": {"pattern": ECHO, "total": "only the first 100 are counted", "matches": "see MATCHES"},
    "http_request": {"url": ECHO, "method": ECHO},
    "json_parse": {"parsed": f"{NAMED}, `value`", "type": "the type is in the JSON"},
    "list_files": {"pattern": ECHO, "count": "the length of the list", "files": "see `entries`, with types"},
    "min_max": {"action": ECHO, "numbers": ECHO},
    "percentage": {"value": ECHO, "percent": ECHO, "operation": ECHO},
    "read_file": {"size": f"{NAMED}, `bytes`: characters are not what a file has"},
    "ripgrep": {"pattern": ECHO, "total": "only the first 100 are counted", "matches": "see MATCHES"},
    "text_transform": {"original": ECHO, "operation": ECHO},
    "write_file": {"bytes_written": f"{NAMED}, `bytes`", "mode": ECHO},
}
"""Fields of the original's results that ours do not have."""

NOT_COMPARED = {
    "current_time": {"iso", "timestamp", "formatted"},
    "random_int": {"value", "values"},
    "random_string": {"value"},
    "uuid": {"uuid", "uuids"},
    "http_request": {"headers"},
}
"""Fields whose values are different in each call. Their types and lengths are compared."""

DIFFERENT: list[tuple[Call, str]] = [
    (("builtin_search", {"query": "a", "limit": 0}), "an invalid limit is an error instead of 3"),
    (("calc", {"expression": "sqrt(16)"}), "there are functions"),
    (
        ("calc", {"expression": "2 ** 5000"}),
        "a number of more than 1,200 digits is refused",
    ),
    (("calc", {"expression": "2 ** 100"}), "an integer that readers of JSON round is a text"),
    (("current_time", {"timezone": "Mars/Base"}), "an unknown time zone is an error instead of UTC"),
    (
        ("date_diff", {"date1": "2024-01-02", "date2": "2024-01-01"}),
        "an earlier date gives a negative number",
    ),
    (
        ("date_diff", {"date1": "2024-01-01", "date2": "2024-01-02 12:00:00"}),
        "each date may have its own form",
    ),
    (
        ("date_diff", {"date1": "2024-01-01", "date2": "2024-01-01", "unit": "years"}),
        "unknown units are errors",
    ),
    (("date_parse", {"date": "03/04/2024"}), "an ambiguous date is an error instead of the third of April"),
    (("delete_file", {"path": "FOLDER/tree"}), "a folder is deleted only with `recursive`"),
    (
        ("execute_command", {"command": "sleep 60", "timeout": 0.3}),
        "a timeout is a result with the output so far",
    ),
    (("execute_command", {"command": "echo $PLANTED"}), "A07: commands do not get the worker's environment"),
    (("get_env", {"key": "PLANTED"}), "a variable is readable only if it is allowed"),
    (("grep_files", {"pattern": "x", "path": "FOLDER/none"}), "a path that does not exist is an error"),
    (("host_lookup", {"url": "https://user:secret@example.com/"}), "the host has no password in it"),
    (("host_lookup", {"url": "http://[::1]:80/"}), "an IPv6 address is read as one"),
    (("http_request", {"url": "http://127.0.0.1:9/"}), "no answer is a coded error instead of a result"),
    (("http_request", {"url": "file:///etc/hostname"}), "only http and https"),
    (("http_request", {"url": "SERVER/a", "method": "POST", "body": {"a": 1}}), "JSON has no spaces"),
    (("json_parse", {"text": "NaN"}), "NaN is not JSON"),
    (("min_max", {"numbers": [3, 1]}), "without an action there are both instead of the smallest"),
    (("random_int", {"min": 5, "max": 5}), "equal bounds have one value"),
    (("random_string", {"charset": "emoji"}), "an unknown charset is an error instead of letters and digits"),
    (("read_file", {"path": "FOLDER/.hidden"}), "names that begin with a dot are invisible"),
    (("read_file", {"path": "FOLDER/latin.txt"}), "bytes that are not UTF-8 are replaced and counted"),
    (("ripgrep", {"pattern": "two", "path": "FOLDER", "file_type": "py"}), "rg need not be installed"),
    (("shell_exec", {"command": "env"}), "A07: an empty env_passthrough is an empty environment"),
    (
        ("text_transform", {"text": "the user's o'clock", "operation": "title"}),
        "no letter after an apostrophe becomes a capital one",
    ),
    (("url_build", {"host": "a.org", "path": "b c"}), "characters that a URL must not contain are escaped"),
    (("url_build", {"host": "good.org@evil.org"}), "a host with a user is refused"),
    (("uuid", {"version": 7}), "an unknown version is an error instead of a random one"),
]


@pytest.fixture(scope="module")
def server() -> Generator[str]:
    """The URL of a server: POST to /search is the search service; anything else repeats its body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.path == "/search":
                asked = json.loads(body)
                asked.pop("api_key", None)  # ours is in a header
                body = json.dumps(
                    {"query": asked["query"], "results": [{"title": json.dumps(asked)}]}
                ).encode()
            self.send_response(200)
            self.send_header("content-type", "text/plain")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

        def log_message(self, *_: Any) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, name="server")
    thread.start()
    yield f"http://127.0.0.1:{listening.server_address[1]}"
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Python of an environment with the original SDK."""
    folder = tmp_path_factory.mktemp("original") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", SDK]
    done = subprocess.run(install, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return python


def filled_folder(folder: Path) -> Path:
    (folder / "tree" / "in").mkdir(parents=True)
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "b.py").write_text("two = 2\n")
    (folder / "delete.txt").write_text("x")
    (folder / ".hidden").write_text("hidden")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


def filled(value: Any, folder: Path, server: str) -> Any:
    """Arguments with the folder and the server in them."""
    if isinstance(value, str):
        return value.replace("FOLDER", str(folder)).replace("SERVER", server)
    if isinstance(value, dict):
        return {name: filled(each, folder, server) for name, each in value.items()}
    return value


@pytest.fixture(scope="module")
def theirs(python: str, server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcomes of the original: of all calls, in order."""
    folder, programs = filled_folder(tmp_path_factory.mktemp("theirs")), tmp_path_factory.mktemp("programs")
    for name in ("echo", "env", "pwd", "sh", "sleep", "true"):  # without rg
        (programs / name).symlink_to(shutil.which(name) or name)
    wanted = [[kind, {}, filled(arguments, folder, server)] for kind, arguments in every_call()]
    environment = {
        "PATH": str(programs), "TZ": "UTC", "PLANTED": "planted", "TAVILY_API_KEY": "k" * 20,
        "TAVILY_URL": f"{server}/search",
    }  # fmt: skip
    done = subprocess.run(
        [python, str(PROGRAM)], input=json.dumps(wanted), capture_output=True, text=True, env=environment,
        timeout=300, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    answer["folder"] = str(folder)
    return answer


def every_call() -> list[Call]:
    return [*SAME, *(call for call, _ in DIFFERENT)]


CONFIG: dict[str, dict[str, Any]] = {
    "http_request": {"deny_private_networks": False},
    "tavily_search": {"api_base": "SERVER"},
}


@pytest.fixture(scope="module")
def ours(server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcomes of our tools, of the same calls in another folder."""
    folder = filled_folder(tmp_path_factory.mktemp("ours"))

    async def outcome(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
        tool = BUILTIN_TOOLS[kind](filled(CONFIG.get(kind, {}), folder, server))
        try:
            jsonschema.validate(arguments, tool.schema())
            return {"result": await tool.invoke(arguments, FakeRun())}
        except (ToolError, jsonschema.ValidationError) as error:
            return {"error": str(error)}
        finally:
            if hasattr(tool, "close"):
                await tool.close()

    async def main() -> list[dict[str, Any]]:
        return [await outcome(kind, filled(arguments, folder, server)) for kind, arguments in every_call()]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (("TZ", "UTC"), ("PLANTED", "planted"), ("TAVILY_API_KEY", "k" * 20)):
            patch.setenv(name, value)
        patch.delenv("LC_MONETARY", raising=False)
        outcomes = asyncio.run(main())
    return {"outcomes": outcomes, "folder": str(folder)}


def compared(kind: str, outcome: dict[str, Any], folder: str) -> Any:
    """What must be equal of an outcome: which fields there are, and the values of most of them."""
    if "error" in outcome:
        return "error"
    left_out, unsteady = LEFT_OUT.get(kind, {}), NOT_COMPARED.get(kind, set())
    shown = json.loads(json.dumps(outcome["result"]).replace(folder, "FOLDER"))
    return {
        name: (type(value).__name__, len(str(value)) if isinstance(value, str) and name != "formatted" else 0)
        if name in unsteady
        else value
        for name, value in shown.items()
        if name not in left_out
    }


def differences(theirs: Any, ours: Any) -> list[str]:
    """The fields of the original's outcome that ours does not have, or with another value."""
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return [] if theirs == ours else [f"{theirs!r} is {ours!r}"]
    return [
        f"{name}: {value!r} is {ours.get(name)!r}"
        for name, value in theirs.items()
        if name not in ours or ours[name] != value
    ]


def both(theirs: dict[str, Any], ours: dict[str, Any], number: int) -> list[str]:
    kind, _ = every_call()[number]
    return differences(
        compared(kind, theirs["outcomes"][number], theirs["folder"]),
        compared(kind, ours["outcomes"][number], ours["folder"]),
    )


def test_every_tool_of_the_original_exists(theirs: dict[str, Any]) -> None:
    """All 31. Each of them is called here, but two."""
    assert set(theirs["types"]) - {"mcp"} == set(BUILTIN_TOOLS) - OURS_ALONE
    assert {kind for kind, _ in every_call()} == set(BUILTIN_TOOLS) - OURS_ALONE - ELSEWHERE


@pytest.mark.parametrize("number", range(len(SAME)), ids=lambda n: f"{SAME[n][0]}-{n}")
def test_equal_arguments_give_equal_results(
    theirs: dict[str, Any], ours: dict[str, Any], number: int
) -> None:
    """Every field of the original's result is there, with the same value; or both are errors."""
    assert both(theirs, ours, number) == []


@pytest.mark.parametrize("number", range(len(DIFFERENT)), ids=lambda n: f"{DIFFERENT[n][0][0]}-{n}")
def test_a_listed_difference_exists(theirs: dict[str, Any], ours: dict[str, Any], number: int) -> None:
    """The list has no entry that is not true any more."""
    assert both(theirs, ours, len(SAME) + number), DIFFERENT[number][1]


def test_fields_that_are_left_out_are_fields_of_the_original(
    theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    """And ours do not have them."""
    for kind, fields in LEFT_OUT.items():
        of_kind = [
            (their["result"], our["result"])
            for (name, _), their, our in zip(every_call(), theirs["outcomes"], ours["outcomes"], strict=True)
            if name == kind and "result" in their and "result" in our
        ]
        assert of_kind or kind == "ripgrep"  # the original's needs the program rg
        assert all(set(fields) <= set(their) for their, _ in of_kind)
        for field in set(fields) - {"matches"}:
            assert all(field not in our for _, our in of_kind), f"{kind}: {field}"


def test_matches_are_the_same_places(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """MATCHES: the original gives file, line and content; ours path from the folder, line and text."""
    for (kind, _), their, our in zip(every_call(), theirs["outcomes"], ours["outcomes"], strict=True):
        if kind == "grep_files" and "result" in their and "result" in our:
            known = {(Path(m["file"]).name, m["line"], m["content"]) for m in their["result"]["matches"]}
            found = {(Path(m["path"]).name, m["line"], m["text"]) for m in our["result"]["matches"]}
            assert found == {each for each in known if not each[0].startswith(".")}
