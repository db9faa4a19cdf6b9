"""`health`: what an exec probe gets from the monitoring server of a worker. No Redis is asked."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from http import HTTPStatus

import pytest

from openagents_worker.local.child_process import free_port
from openagents_worker.worker.background import Health
from openagents_worker.worker.monitoring import MonitoringReply, MonitoringServer, Route, checks_answer
from tests.cli.conftest import Command, Done, typed

Serve = Callable[..., int]
GOOD = (("event loop", ""), ("watchdog", ""))


@pytest.fixture
def serve() -> Generator[Serve]:
    """Starts the monitoring server of a worker with these routes, and returns its port."""
    with ExitStack() as started:

        def start(**routes: Route) -> int:
            paths = {f"/{name}": route for name, route in routes.items()}
            server = MonitoringServer("127.0.0.1", 0, paths, health=Health(), leave=lambda _: None)
            server.start()
            started.callback(server.stop)
            assert server.wait_opened(30)
            assert server.port is not None
            return server.port

        yield start


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `openagents-worker health` with these arguments. Its Redis does not exist."""
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.delenv("OPENAGENTS_HEALTH_PORT", raising=False)

    def run(*arguments: str) -> Done:
        return typed(["health", *arguments], monkeypatch, capsys)

    return run


def test_a_worker_that_stops_is_alive_and_not_ready(health: Command, serve: Serve) -> None:
    """Exit code 3 and the failed check; with --live only what a restart would mend is asked."""
    port = serve(
        livez=lambda _: checks_answer(GOOD),
        readyz=lambda _: checks_answer((*GOOD, ("accepts runs", "the worker hands its runs over"))),
    )

    ready, live = health("--port", str(port)), health("--live", "--port", str(port))

    assert (ready.code, live.code) == (3, 0)
    assert ready.out.splitlines()[-1] == "[-] accepts runs: the worker hands its runs over"
    assert live.out == "[+] event loop: ok\n[+] watchdog: ok\n"
    found = health("--json", "--port", str(port)).json
    assert found["healthy"] is False
    assert found["checks"][-1] == {"name": "accepts runs", "problem": "the worker hands its runs over"}


def test_the_port_is_that_of_the_worker(
    health: Command, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same settings; an address that stands for all of them is asked on this machine."""
    port = serve(readyz=lambda _: checks_answer(GOOD))
    without = health()
    monkeypatch.setenv("OPENAGENTS_HEALTH_PORT", str(port))
    monkeypatch.setenv("OPENAGENTS_MONITORING_ADDRESS", "0.0.0.0")  # noqa: S104 - the setting of a container

    assert health().code == 0
    assert without.code == 2
    assert "OPENAGENTS_HEALTH_PORT is not set" in without.err


def test_nobody_answers(health: Command) -> None:
    """The worker has not started, or it has ended."""
    done = health("--port", str(free_port()))

    assert done.code == 3
    assert done.out.startswith("[-] worker: no answer at 127.0.0.1:")


def test_another_server_is_not_a_healthy_worker(health: Command, serve: Serve) -> None:
    """Whatever it answers."""
    port = serve(readyz=lambda _: MonitoringReply(HTTPStatus.OK, b"welcome"))

    for arguments in (["--port", str(port)], ["--live", "--port", str(port)]):
        done = health(*arguments)
        assert done.code == 3
        assert "but not as a worker does" in done.out
