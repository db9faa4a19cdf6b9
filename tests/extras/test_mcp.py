"""MCP servers that others wrote, with the oldest and the newest version of the official SDK.

Each version has an environment with our wheel. The servers are those of the package indexes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.deployment.commands import ROOT, free_port
from tests.extras.environments import Environment, Environments
from tests.extras.mcp_program import CLIENT, PROGRAM
from tests.extras.server_programs import environment
from tests.support.deployment import installed
from tests.support.runner import agent, scripted
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.extras, pytest.mark.timeout(1200)]

VERSIONS = ("mcp==1.28.*", "mcp>=1.28,<2", "mcp>=2,<3")
PASSED = {"env_passthrough": ["PATH", "HOME"]}
EVERYTHING = "@modelcontextprotocol/server-everything"
TIMEOUT_S = 300


@pytest.fixture(scope="module", params=VERSIONS)
def sdk(request: pytest.FixtureRequest, environments: Environments) -> Environment:
    """An environment with our wheel and this version of the SDK."""
    name = f"mcp-{VERSIONS.index(request.param)}"
    folder = environments.new_environment(f"env-{os.getpid()}-{name}")
    project = environments.folder / f"{name}-{os.getpid()}-project"
    project.mkdir()
    asked = [f"{environments.wheel}[worker,mcp]", request.param]
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    done = subprocess.run([*command, *asked], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return Environment(folder, ("worker", "mcp"), project)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs of the servers that are written in Python."""
    return environment(tmp_path_factory.mktemp("servers") / "env", "mcp-server-time", "mcp-server-git")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of the reference server, which is written in TypeScript."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("the reference server needs Node and npm")
    folder = tmp_path_factory.mktemp("everything")
    command = [npm, "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(folder), EVERYTHING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "node_modules" / EVERYTHING / "dist" / "index.js"


def used(sdk: Environment, *asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What the toolset says of these servers."""
    done = sdk.run("python", "-c", PROGRAM, json.dumps(asked))
    assert done.returncode == 0, done.stderr[-4000:]
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["left"] == []
    found: list[dict[str, Any]] = shown["found"]
    return found


def asked(server: dict[str, Any], *calls: Sequence[Any], **options: Any) -> dict[str, Any]:
    return {"config": {"server": server, **options}, "calls": calls}


@pytest.mark.defect("M04")
def test_servers_written_in_python(sdk: Environment, servers: Path, tmp_path: Path) -> None:
    """The time, and a git repository, over stdio."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    tokyo = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}
    time, git = used(
        sdk,
        asked(
            {"command": str(servers / "mcp-server-time"), **PASSED},
            ("convert_time", tokyo),
            ("get_current_time", {"timezone": "nowhere"}),
        ),
        asked(
            {"command": str(servers / "mcp-server-git"), **PASSED},
            ("git_status", {"repo_path": str(tmp_path)}),
            ("git_branch", {"repo_path": str(tmp_path)}),
            connection_mode="pooled",
        ),
    )
    converted = time["results"][0]
    assert "21:00" in (converted if isinstance(converted, str) else json.dumps(converted))
    assert time["results"][1]["code"] == "tool.error"
    assert "git_commit" in git["tools"]
    assert "No commits yet" in git["results"][0]


def test_the_reference_server_over_stdio(sdk: Environment, everything: Path) -> None:
    [found] = used(
        sdk,
        asked(
            {"command": "node", "args": [str(everything), "stdio"], **PASSED},
            ("echo", {"message": "hi"}),
            ("get-tiny-image", {}),
            ("get-structured-content", {"location": "Chicago"}),
            ("srv_list_prompts", {}),
            ("srv_list_resources", {}),
            ("srv_get_prompt", {"name": ["first", 3, "name"]}),
            ("srv_read_resource", {"uri": ["first", 4, "uri"]}),
            connection_mode="pooled",
            resources=True,
            prompts=True,
        ),
    )
    echo, image, structured, prompts, resources, messages, resource = found["results"]
    assert echo == "Echo: hi"
    assert "image" in [block["type"] for block in image]
    assert "temperature" in structured
    assert prompts
    assert resources
    assert messages[0]["content"]
    assert isinstance(resource, str)
    assert resource


@contextmanager
def serving(everything: Path, kind: str) -> Generator[str]:
    port = free_port()
    log = everything.with_suffix(f".{port}.log")
    with log.open("w") as file:
        process = subprocess.Popen(
            ["node", str(everything), kind], env={**os.environ, "PORT": str(port)}, stdout=file, stderr=file
        )
    try:
        wait_for(lambda: str(port) in log.read_text(), "the reference server listens", TIMEOUT_S)
        yield f"http://127.0.0.1:{port}/{'sse' if kind == 'sse' else 'mcp'}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("kind", "transport"), [("streamableHttp", "streamable_http"), ("sse", "sse")])
def test_the_reference_server_over_http(
    sdk: Environment, everything: Path, kind: str, transport: str
) -> None:
    """The protocol is found without being named."""
    with serving(everything, kind) as url:
        found = used(
            sdk,
            *(
                asked({"url": url, "transport": each}, ("echo", {"message": each}), connection_mode=mode)
                for each in (transport, "auto")
                for mode in ("per_call", "pooled")
            ),
        )
    results = [each["results"] for each in found]
    assert results == [[f"Echo: {transport}"]] * 2 + [["Echo: auto"]] * 2


def test_agents_are_tools_for_the_client_of_each_version(sdk: Environment, tmp_path: Path) -> None:
    greeter = agent("greeter", llm=scripted({"text": "hello"}))
    with installed(tmp_path, greeter) as installation:
        env = {"OPENAGENTS_REDIS_URL": installation.stack.redis_url}
        done = sdk.run("python", "-c", CLIENT, sdk.program("openagents-worker"), "mcp", **env)
    assert done.returncode == 0, done.stderr[-4000:]
    shown = json.loads(done.stdout.splitlines()[-1])
    assert "greeter" in shown["tools"]
    assert shown["result"]["structuredContent"]["output"] == "hello"
    assert any(message.startswith("run.") for message in shown["told"])


def test_the_tests_with_a_faulty_server_pass_with_the_first_version_too(tmp_path: Path) -> None:
    """`make test` runs them with the second one."""
    target = ["--no-deps", "--target", str(tmp_path), "mcp>=1.28,<2", "httpx-sse"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *target]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    files = [str(ROOT / "tests" / "mcp" / f"test_{name}.py") for name in ("calls", "connections")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S * 2,
    )
    assert done.returncode == 0, done.stdout[-4000:]
