"""Metrics and probes of a worker process, over HTTP. The worker, its Redis and its model are real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import suppress
from http import HTTPStatus

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from openagents_worker.local.child_process import free_port
from openagents_worker.telemetry.series import FLEET_SERIES, SERIES
from openagents_worker.worker import monitoring
from openagents_worker.worker.background import Health
from openagents_worker.worker.monitoring import MonitoringReply, MonitoringServer, checks_answer
from tests.support.deployment import Installation, agent, call, installed
from tests.support.waiting import wait_for

_opener = urllib.request.build_opener()
TOOLS = "tests.worker.workshop"
Samples = dict[tuple[str, tuple[str, ...]], float]
"""The values by the name of the sample and by the values of its labels, in the order of their names."""


def get(port: int, path: str, *, accept: str = "*/*", method: str = "GET") -> tuple[int, str]:
    """The status and the text of an answer; 0 if nobody listens."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", headers={"Accept": accept}, method=method
    )
    try:
        with _opener.open(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def health(port: int, *arguments: str) -> int:
    """The exit code of an exec probe."""
    command = [sys.executable, "-m", "openagents_worker.cli", "health", "--port", str(port), *arguments]
    return subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60).returncode


# --- the server ---


@pytest.fixture
def serve() -> Generator[Callable[..., MonitoringServer]]:
    """Starts a server that answers at `/` with the number of bytes that were asked for."""
    started: list[MonitoringServer] = []

    def start(port: int = 0) -> MonitoringServer:
        routes = {"/": lambda _: MonitoringReply(HTTPStatus.OK, b"hello")}
        server = MonitoringServer("127.0.0.1", port, routes, health=Health(), leave=lambda _: None)
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def opened(server: MonitoringServer) -> int:
    assert server.wait_opened(30)
    assert server.port is not None
    return server.port


def test_only_known_paths_and_methods_are_answered(serve: Callable[..., MonitoringServer]) -> None:
    """A query is ignored. Nothing else of the process is served."""
    port = opened(serve())

    assert get(port, "/?x=1") == (200, "hello")
    assert get(port, "/", method="HEAD") == (200, "")
    assert get(port, "/other")[0] == 404
    assert get(port, "/", method="POST")[0] == 501


def test_clients_that_send_nothing_do_not_block_others_for_long(
    serve: Callable[..., MonitoringServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few connections are served at a time; the next one is closed at once, until one of them ends."""
    port = opened(serve())
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(monitoring.MAX_CONNECTIONS)]
    try:
        wait_for(lambda: get(port, "/") == (0, ""), "all connections are in use")
        silent.pop().close()
        wait_for(lambda: get(port, "/") == (200, "hello"), "a connection is free again")
    finally:
        for each in silent:
            each.close()


def test_clients_that_send_a_byte_from_time_to_time_do_not_block_others_for_long(
    serve: Callable[..., MonitoringServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their requests never end. Without an answer to its probes, a worker would be restarted."""
    monkeypatch.setattr(monitoring, "CONNECTION_S", 0.1)
    port = opened(serve())
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(monitoring.MAX_CONNECTIONS)]
    try:

        def is_answered() -> bool:
            for each in slow:
                with suppress(OSError):
                    each.sendall(b"G")
            return get(port, "/")[0] == 200

        wait_for(is_answered, "a probe is answered")
    finally:
        for each in slow:
            each.close()


def test_a_process_that_could_start_no_thread_answers_again_when_it_can(
    serve: Callable[..., MonitoringServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection without a thread takes no place. Otherwise, the worker would be restarted later."""
    port = opened(serve())

    def refuses(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as limited:
        limited.setattr(monitoring.ThreadingHTTPServer, "process_request", refuses)
        for _ in range(monitoring.MAX_CONNECTIONS):
            assert get(port, "/") == (0, "")

    assert get(port, "/") == (200, "hello")


def test_a_port_in_use_is_opened_when_it_is_free(
    serve: Callable[..., MonitoringServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For example, because an old worker still hands its runs over. It is logged, and the part fails."""
    monkeypatch.setattr(monitoring, "BIND_AGAIN_S", 0.01)
    first = serve()
    port = opened(first)
    second = serve(port)
    wait_for(lambda: second.health.report().is_failing, "the port is in use")
    assert second.health.report().error_code == "monitoring.port_in_use"
    assert second.port is None

    first.stop()

    assert opened(second) == port
    assert get(port, "/") == (200, "hello")
    assert caplog.text.count("monitoring.port_in_use") == 1


def test_a_probe_lists_each_check() -> None:
    """The status says whether all are good, the text which one is not."""
    bad = checks_answer([("lease", ""), ("consumer", "not connected to the broker")])

    assert bad.status == 503
    assert bad.body == b"[+] lease: ok\n[-] consumer: not connected to the broker\n"
    assert checks_answer([("lease", "")]).status == 200


# --- a worker ---


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory, port: int) -> Generator[Installation]:
    tools = {name: f"{TOOLS}.{name}" for name in ("count", "hang", "refuse")}
    with installed(
        tmp_path_factory.mktemp("monitoring"),
        agent("clerk", tools=tools),
        agent("careful", tools={"count": {"impl": f"{TOOLS}.count", "approval": "always"}}),
        OPENAGENTS_METRICS_PORT=str(port),
        OPENAGENTS_HEALTH_PORT=str(port),
        OPENAGENTS_DRAIN_TIMEOUT_S="30",
    ) as installation:
        yield installation


def scrape(port: int) -> Samples:
    status, text = get(port, "/metrics")
    assert status == 200
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_worker_is_alive_and_ready(installation: Installation, port: int) -> None:
    """Without a command to Celery, and without a secret or an id in the answer."""
    wait_for(lambda: get(port, "/readyz")[0] == 200, "it is ready")

    assert get(port, "/livez") == (200, "[+] event loop: ok\n[+] watchdog: ok\n")
    assert get(port, "/readyz")[1] == (
        "[+] event loop: ok\n[+] watchdog: ok\n[+] lease: ok\n[+] consumer: ok\n[+] accepts runs: ok\n"
    )


def test_metrics_tell_what_runs_have_done(installation: Installation, port: int) -> None:
    """Each part of a run is counted once, with its agent, model or tool, and never with its id."""
    installation.model.will_say(
        {"tool_calls": [call("count", number=1)], "usage": {"input_tokens": 1_000_000, "output_tokens": 0}},
        {"error": "rate_limit"},
        {"tool_calls": [call("refuse", amount=11)]},
        {"text": "done", "usage": {"input_tokens": 0, "output_tokens": 100_000}},
    )
    handle = installation.submit("clerk")
    handle.wait(60)
    installation.model.will_say({"tool_calls": [call("count", number=1)]}, {"text": "done"})
    parked = installation.submit("careful")
    wait_for(lambda: parked.record().state == "awaiting_approval", "it waits for a decision")
    wait_for(lambda: scrape(port)[("openagents_fleet_runs", ("awaiting_approval",))] == 1, "it is counted")
    found = {f"{name}{{{','.join(labels)}}}": value for (name, labels), value in scrape(port).items()}

    assert found["openagents_runs_ended_total{clerk,completed}"] == 1
    assert found["openagents_run_active_seconds_count{clerk}"] == 1
    assert found["openagents_attempts_total{clerk,finished}"] == 1
    assert found["openagents_attempts_total{careful,suspended}"] == 1
    assert found["openagents_runs_parked_total{approval}"] == 1
    assert found["openagents_claims_total{claimed}"] == 2
    assert found["openagents_model_calls_total{clerk,,test-model}"] == 3
    assert found["openagents_model_call_duration_seconds_count{test-model}"] == 4
    assert found["openagents_model_call_retries_total{test-model}"] == 1
    assert found["openagents_tool_calls_total{clerk,,count}"] == 1
    assert found["openagents_tool_calls_total{clerk,tool.permanent,refuse}"] == 1
    assert found["openagents_calls_total{tool.permanent,tool}"] == 1
    assert found["openagents_tokens_total{clerk,test-model,input}"] >= 1_000_000
    assert found["openagents_tokens_total{clerk,test-model,output}"] >= 100_000
    assert found["openagents_cost_usd_total{clerk,test-model}"] == pytest.approx(2, abs=0.01)
    wait_for(lambda: scrape(port)[("openagents_lease_renewal_seconds_count", ())] > 0, "a heartbeat")
    assert found["openagents_lease_remaining_seconds{}"] > 0
    assert found["openagents_tool_threads{limit}"] == 64
    assert found["openagents_run_slots{}"] == 500
    assert found["openagents_ready{}"] == 1
    assert found["openagents_part_failing{heartbeat}"] == 0
    assert found["openagents_fleet_up{}"] == 1
    assert found["openagents_fleet_workers{alive}"] == 1
    assert found["openagents_queue_runs{agents}"] == 0
    assert found["openagents_queue_workers{agents}"] == 1
    assert found["process_resident_memory_bytes{}"] > 1e6
    parked.cancel()
    text = get(port, "/metrics")[1]
    assert handle.id not in text
    assert handle.record().session_id not in text


def test_every_series_has_the_type_and_the_help_of_the_table(installation: Installation, port: int) -> None:
    """In both formats that Prometheus asks for. Series of what has not happened may be missing."""
    text = get(port, "/metrics")[1]
    openmetrics = get(port, "/metrics", accept="application/openmetrics-text; version=1.0.0")[1]
    families = {family.name: family for family in text_string_to_metric_families(text)}

    assert {family.name for family in parse_openmetrics(openmetrics)} == families.keys()
    for series in SERIES:
        if series.name in families:
            assert (families[series.name].type, families[series.name].documentation) == (
                series.kind.value,
                series.help,
            )
    missing = {series.name for series in SERIES} - families.keys()
    assert missing <= {"openagents_limit_runs_waiting", "openagents_run_slots"}, missing
    assert len(FLEET_SERIES) > len(missing)


def test_a_worker_without_redis_is_alive_and_not_ready(installation: Installation, port: int) -> None:
    """A restart would not help, so only the readiness depends on Redis. Metrics come without the fleet."""
    assert installation.stack.redis is not None
    redis = installation.stack.redis.pid
    os.kill(redis, signal.SIGSTOP)
    try:
        wait_for(lambda: "[-] lease" in get(port, "/readyz")[1], "the lease is over")
        assert get(port, "/livez")[0] == 200
        assert [health(port), health(port, "--live")] == [3, 0]
        wait_for(lambda: scrape(port)[("openagents_fleet_up", ())] == 0, "the fleet cannot be read")
        assert scrape(port)[("openagents_ready", ())] == 0
    finally:
        os.kill(redis, signal.SIGCONT)

    wait_for(lambda: get(port, "/readyz")[0] == 200, "it is ready again")


@pytest.mark.long
def test_probes_and_metrics_over_a_kill_and_a_stop(installation: Installation, port: int) -> None:
    """A worker that finds its port in use works without it. It opens the port when the other one is dead.

    It counts the run that it has recovered. While it hands its runs over, it is alive and not ready.
    """
    installation.model.will_say({"tool_calls": [call("count", number=1)]}, {"tool_calls": [call("hang")]})
    handle = installation.submit("clerk")
    wait_for(lambda: "hang" in [line.get("tool") for line in installation.diary(handle.id)], "it hangs")
    second = installation.stack.start_worker("second")
    wait_for(lambda: any("monitoring.port_in_use" in line for line in second.lines), "the port is in use")

    installation.worker.kill()
    wait_for(lambda: get(port, "/readyz")[0] == 200, "the second worker answers")
    wait_for(lambda: scrape(port).get(("openagents_runs_in_progress", ())) == 1, "it executes the run")
    found = scrape(port)
    # On a busy machine a worker may be lost once more, without a run.
    assert found[("openagents_workers_lost_total", ())] >= 1
    assert found[("openagents_recovery_delay_seconds_count", ())] >= 1
    assert found[("openagents_calls_replayed_total", ("tool",))] == 1
    assert found[("openagents_fleet_runs", ("running",))] == 1

    os.kill(second.pid, signal.SIGTERM)
    wait_for(lambda: get(port, "/readyz")[0] == 503, "it is not ready")
    assert "[-] accepts runs: the worker hands its runs over and stops" in get(port, "/readyz")[1]
    assert get(port, "/livez")[0] == 200
    second.kill()
