"""The model server of `openagents_worker.testing`: what tests of agents talk to in place of a provider."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest

from openagents_worker.errors import PluginConfigError
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.support.json_lines import complete_lines
from tests.support.waiting import LOST_S, await_for, wait_for

HI = {"role": "user", "content": "hi"}
ADD = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "x", **ADD}]}
RESULT = {"role": "tool", "tool_call_id": "x", "content": "1"}
SAID = {"role": "assistant", "content": "There."}
COMMAND = [sys.executable, "-m", "openagents_worker.testing.model_server"]


async def _post(url: str, *messages: Any, key: str | None = None, **body: Any) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key, "X-Call": "main.0"}
    async with httpx.AsyncClient() as http:
        return await http.post(
            f"{url}/chat/completions", json={"model": "m", "messages": messages, **body}, headers=headers
        )


async def _said(url: str, *messages: Any, key: str | None = None) -> str:
    reply = await _post(url, *messages, key=key)
    content: str = reply.json()["choices"][0]["message"]["content"]
    return content


def _log(path: Path) -> list[dict[str, Any]]:
    return complete_lines(path)


# --- replies ---------------------------------------------------------------------------------------------


async def test_a_script_answers_each_turn_with_its_reply() -> None:
    """The turn is the number of assistant messages since the last user message, whatever lies before it."""
    async with ModelServer([{"text": "one"}, {"text": "two"}]) as server:
        assert await _said(server.url, HI) == "one"
        assert await _said(server.url, HI, CALLED, RESULT) == "two"
        assert await _said(server.url, HI, CALLED, RESULT, SAID, HI) == "one"
        over = await _post(server.url, HI, CALLED, RESULT, SAID)

    assert over.status_code == 400
    assert over.json()["error"]["message"] == "the script has ended after 2 replies"


async def test_faults_meet_the_first_tries_of_a_call() -> None:
    """Tries are told apart by `Idempotency-Key`: each call meets the faults before its reply, once."""
    script = [
        {"error": "rate_limit", "times": 2, "retry_after_ms": 1200},
        {"error": "response"},
        {"text": "ok"},
    ]

    async with ModelServer(script) as server:
        replies = [await _post(server.url, HI, key=key) for key in "aabaabbab"]

    statuses = {
        key: [r.status_code for r, k in zip(replies, "aabaabbab", strict=True) if k == key] for key in "ab"
    }
    assert statuses == {"a": [429, 429, 400, 200, 200], "b": [429, 429, 400, 200]}
    assert (replies[0].headers["retry-after-ms"], replies[0].headers["retry-after"]) == ("1200", "2")


async def test_without_a_key_tries_are_told_apart_by_the_messages() -> None:
    """A plain client meets the faults too."""
    async with ModelServer([{"error": "server_error"}, {"text": "ok"}]) as server:
        statuses = [(await _post(server.url, HI)).status_code for _ in range(3)]

    assert statuses == [500, 200, 200]


async def test_a_function_sees_the_request_and_says_the_reply() -> None:
    """The model as a Python function, sync or async."""
    asked: list[ModelServerRequest] = []

    async def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append(request)
        return {"text": "both", "tool_calls": [{"name": "add", "arguments": {"x": 1}}]}

    async with ModelServer(reply) as server:
        tools = [{"type": "function", "function": {"name": "add"}}]
        answer = (await _post(server.url, HI, CALLED, RESULT, key="k", tools=tools)).json()

    [request] = asked
    assert (request.n, request.model, request.stream, request.headers["idempotency-key"]) == (
        1,
        "m",
        False,
        "k",
    )
    message = answer["choices"][0]["message"]
    assert message["content"] == "both"
    assert message["tool_calls"][0]["id"] == "call_1_0"
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"x": 1}
    assert set(answer["usage"]) >= {"prompt_tokens", "completion_tokens", "total_tokens"}


@pytest.mark.parametrize("entry", [{"txt": "typo"}, {"error": "rate"}, None])
async def test_a_function_that_says_nonsense_is_heard_of(
    entry: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake in a test's own model is a 400 with its reason, not a hang."""
    async with ModelServer(lambda _: entry) as server:
        reply = await _post(server.url, HI)

    assert reply.status_code == 400
    assert "the reply function's entry" in reply.json()["error"]["message"]
    assert "the reply function failed" in capsys.readouterr().err


def test_a_script_is_checked_before_the_server_starts() -> None:
    """A bad entry is named by its index."""
    with pytest.raises(PluginConfigError, match=r"script\[1\]"):
        ModelServer([{"text": "x"}, {"error": "nonsense"}])


async def test_a_stream_is_what_openai_sends() -> None:
    """Role first, text in words, arguments in fragments, then the finish, the usage and `[DONE]`."""
    entry = {"text": "two words", "tool_calls": [{"name": "add", "arguments": {"number": 12345}}]}

    async with ModelServer(lambda _: entry) as server:
        reply = await _post(server.url, HI, stream=True, stream_options={"include_usage": True})
    *events, done = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    chunks = [json.loads(event) for event in events]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    fragments = [delta["tool_calls"][0]["function"]["arguments"] for delta in deltas if "tool_calls" in delta]

    assert reply.headers["content-type"] == "text/event-stream"
    assert [delta["content"] for delta in deltas if "content" in delta] == ["", "two ", "words"]
    assert fragments == ["", '{"number', '":12345}']
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"] > 0) == ([], True)
    assert done == "[DONE]"


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_a_reply_that_takes_all_its_tokens_was_cut(limit: str) -> None:
    """A script cuts a reply by saying that it used exactly what the request allows."""
    entry = {"text": "Once upon a", "usage": {"output_tokens": 3}}

    async with ModelServer(lambda _: entry) as server:
        reasons = [
            (await _post(server.url, HI, **{limit: allowed})).json()["choices"][0]["finish_reason"]
            for allowed in (3, 4)
        ]

    assert reasons == ["length", "stop"]


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ({"error": "rate_limit"}, 429, "rate_limit_exceeded"),
        ({"error": "server_error"}, 500, "server_error"),
        ({"error": "server_error", "status": 503}, 503, "server_error"),
        ({"error": "response"}, 400, "invalid_request_error"),
        ({"error": "response", "status": 404}, 404, "invalid_request_error"),
    ],
)
async def test_a_refusal_says_its_status_and_code(fault: dict[str, Any], status: int, code: str) -> None:
    """The code follows the status, as with a provider; each answer has a number of its own."""
    async with ModelServer(lambda _: fault) as server:
        replies = [await _post(server.url, HI) for _ in range(2)]

    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in replies] == [(status, code)] * 2
    assert [reply.headers["x-request-id"] for reply in replies] == ["req_1", "req_2"]


async def test_other_addresses() -> None:
    """`/v1/models`, `/health` and `/log` answer; the rest is 404, and no completion request is 400."""
    async with ModelServer([{"text": "x"}]) as server, httpx.AsyncClient() as http:
        base = server.url.removesuffix("/v1")
        await _said(server.url, HI)

        assert (await http.get(f"{server.url}/models")).json()["object"] == "list"
        assert (await http.get(f"{base}/health")).json() == {"status": "ok"}
        assert (await http.get(f"{base}/log")).json() == server.log
        assert (await http.get(f"{base}/elsewhere")).status_code == 404
        for body in (
            b"no json",
            b"[]",
            b'{"messages": [1], "model": "m"}',
            b'{"messages": [], "tools": [1], "model": ""}',
        ):
            assert (await http.post(f"{server.url}/chat/completions", content=body)).status_code == 400


# --- the log ---------------------------------------------------------------------------------------------


async def test_the_log_tells_what_was_asked_and_answered(tmp_path: Path) -> None:
    """Two lines a request, written as it happens; no key is among them."""
    path = tmp_path / "model.jsonl"
    tools = [{"type": "function", "function": {"name": "add"}}]

    async with ModelServer([{"error": "rate_limit"}, {"text": "x"}], log_path=path) as server:
        await _post(server.url, HI, key="r:0", tools=tools)
        await _post(server.url, HI, key="r:0")
        while_running = _log(path)

    received, answered, _, again = while_running
    assert server.log == while_running == _log(path)
    assert {
        name: received[name]
        for name in ("event", "id", "call", "key", "model", "messages", "tools", "stream")
    } == {
        "event": "received",
        "id": 1,
        "call": "main.0",
        "key": "r:0",
        "model": "m",
        "messages": [HI],
        "tools": ["add"],
        "stream": False,
    }
    assert (answered["event"], answered["id"], answered["status"], again["status"]) == (
        "answered",
        1,
        429,
        200,
    )
    assert answered["at"] >= received["at"]


# --- life ------------------------------------------------------------------------------------------------


def test_a_server_in_a_thread_serves_tests_without_a_loop() -> None:
    """For tests that block; afterwards the port is closed."""
    with ModelServer([{"text": "x"}]).serve_in_thread() as server:
        address = server.url.removesuffix("/v1") + "/health"
        with urllib.request.urlopen(address) as reply:  # noqa: S310 - an http address of this machine
            assert json.load(reply) == {"status": "ok"}

    with pytest.raises(OSError):
        urllib.request.urlopen(address)  # noqa: S310 - as above


def test_a_taken_port_is_an_error_where_the_server_was_started() -> None:
    """In a thread too."""
    with (
        ModelServer([]).serve_in_thread() as server,
        pytest.raises(OSError),
        ModelServer([], port=server.port).serve_in_thread(),
    ):
        pass


@pytest.mark.parametrize("fault", [{"error": "hang"}, {"text": "slow", "latency_ms": 600_000}])
async def test_stopping_waits_for_no_answer(fault: dict[str, Any]) -> None:
    """Connections that wait are closed."""
    async with ModelServer(lambda _: fault) as server:
        request = asyncio.create_task(_post(server.url, HI))
        await await_for(lambda: server.log, "the request arrived")

    with pytest.raises(httpx.TransportError):
        await request


async def test_connections_stay_open() -> None:
    """One connection carries many requests, streamed and refused ones too."""
    script = [{"error": "response"}, {"text": "x"}]
    async with ModelServer(script) as server, httpx.AsyncClient() as http:
        for stream in (False, True, False, True):
            body = {"model": "m", "messages": [HI], "stream": stream}
            await http.post(f"{server.url}/chat/completions", json=body)

    assert server.connections == 1


# --- a process of its own --------------------------------------------------------------------------------


@contextlib.contextmanager
def _process(*arguments: str, cwd: Path | None = None) -> Generator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True, cwd=cwd) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.json"
    path.write_text(json.dumps([{"text": "from a file"}]))
    return str(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_serves_until_it_is_told(script: str, tmp_path: Path, number: int) -> None:
    """Its first line is its address; SIGTERM and SIGINT end it with success."""
    log = tmp_path / "log.jsonl"

    with _process("--script", script, "--log", str(log)) as (process, url):
        said = asyncio.run(_said(url, HI))
        process.send_signal(number)
        code = process.wait(60)

    assert (said, code) == ("from a file", 0)
    assert [event["event"] for event in _log(log)] == ["received", "answered"]


def test_a_process_serves_a_function(tmp_path: Path) -> None:
    """`module:function` is imported from the working directory."""
    (tmp_path / "my_model.py").write_text("def reply(request):\n    return {'text': f'turn {request.n}'}\n")

    with _process("--script", "my_model:reply", cwd=tmp_path) as (_, url):
        assert asyncio.run(_said(url, HI, CALLED, RESULT)) == "turn 1"


@pytest.mark.parametrize("content", ['{"text": "x"}', '[{"error": "nonsense"}]'])
def test_a_script_that_cannot_be_used_ends_the_process(tmp_path: Path, content: str) -> None:
    """Exit code 1 and one line that says why."""
    path = tmp_path / "script.json"
    path.write_text(content)

    done = subprocess.run([*COMMAND, "--script", str(path)], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "script" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_a_process_can_end_with_its_parent(script: str) -> None:
    """With `--die-with-parent` no server outlives a killed test run."""
    parent_code = textwrap.dedent(
        """
        import subprocess, sys, time
        child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
        print(child.pid, child.stdout.readline(), flush=True)
        time.sleep(600)
        """
    )
    command = [sys.executable, "-c", parent_code, *COMMAND, "--script", script, "--die-with-parent"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline().split()[0])

        parent.kill()

    wait_for(lambda: _is_gone(pid), "the server ended")


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # nobody collects it


def test_a_client_killed_in_the_middle_of_a_stream_disturbs_nobody(script: str) -> None:
    """The server notes that it is gone and goes on with the others."""
    client_code = textwrap.dedent(
        """
        import httpx, sys
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with httpx.stream("POST", sys.argv[1] + "/chat/completions", json=body) as reply:
            for line in reply.iter_lines():
                print("heard", flush=True)
        """
    )
    with ModelServer(lambda _: {"text": "word " * 1000}, token_delay_ms=5).serve_in_thread() as server:
        with subprocess.Popen(
            [sys.executable, "-c", client_code, server.url], stdout=subprocess.PIPE
        ) as client:
            assert client.stdout is not None
            client.stdout.readline()
            client.kill()

        wait_for(
            lambda: [e["status"] for e in server.log if e["event"] == "answered"] == [499], "it was noticed"
        )
        with urllib.request.urlopen(server.url + "/models") as reply:  # noqa: S310 - http on this machine
            assert reply.status == 200


@pytest.mark.parametrize("steps", range(6))
async def test_a_server_that_stops_closes_a_connection_that_it_is_accepting(steps: int) -> None:
    """At each step of asyncio between the kernel's connection and the first step of its task."""
    server = ModelServer([{"text": "hello"}])
    await server.start()
    with socket.socket() as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect((server.host, server.port))
        for _ in range(steps):
            await asyncio.sleep(0)

        await server.stop()

        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(LOST_S):
                assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
    assert server.open_connections == 0
