"""Reports of ended runs: complete, without content, at least once, and never at the cost of a run."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.diagnostics.base import DiagnosticsExporter, RunReport, exporter_of
from openagents_worker.models import StopReason
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.testing.worker import AgentsWorker, config_of
from openagents_worker.worker.outbox import Outbox, OutboxLimits, Recipients
from openagents_worker.worker.run_export import MAX_TRIES, MAX_WAITING, RunExport
from tests.support.runner import Process, agent, calls, process, scripted
from tests.support.waiting import await_for, wait_for

LIMITS = OutboxLimits(poll_s=0.01, deliver_s=5.0, retry_s=0.01, max_retry_s=0.01)
SECRET = "the customer's diagnosis"


class Kept(DiagnosticsExporter):
    """Keeps the reports; `gate` holds the exporter's thread, `problems` are raised first."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.reports: list[RunReport] = []
        self.problems: list[BaseException] = []
        self.gate = threading.Event()
        self.gate.set()

    def export(self, report: RunReport) -> None:
        self.gate.wait(30)
        if self.problems:
            raise self.problems.pop(0)
        self.reports.append(report)


class Original:
    """An exporter for the original SDK."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.ended: list[tuple[Any, Any]] = []

    def record_llm_call(self, run_id: str, metrics: Any) -> None:
        self.calls.append((run_id, metrics))

    def on_run_complete(self, result: Any, snapshot: Any) -> None:
        result.usage.llm_calls = 99  # the original's exporters change the usage
        self.ended.append((result, snapshot))


def shop(**fields: Any) -> dict[str, Any]:
    llm = scripted(calls(("calc", {"expression": "1+1"})), {"text": SECRET})
    return agent(**{"llm": llm, "tools": [{"id": "calc", "type": "calc"}], **fields})


@asynccontextmanager
async def exported(redis_url: str, exporter: Any, *agents: Any, **file: Any) -> AsyncIterator[Process]:
    """A worker whose ended runs are exported."""
    async with process(redis_url, *(agents or (shop(),)), **file) as p:
        export = RunExport(p.store, exporter_of(exporter), name="test")
        outbox = Outbox(p.store, Recipients(all=(export,), limits=LIMITS), leave=lambda _: None)
        await outbox.start()
        try:
            await await_for(lambda: outbox.health.report().rounds >= 1, "the exporter is registered")
            yield p
        finally:
            await outbox.aclose()
            exporter.__dict__.get("gate", threading.Event()).set()


async def test_a_report_has_calls_usage_and_times_and_no_content(redis_url: str) -> None:
    """Neither prompts and answers, nor arguments and results."""
    exporter = Kept()
    async with exported(redis_url, exporter) as p:
        record = await p.run(input_text=SECRET, labels={"team": "blue"})
        await await_for(lambda: exporter.reports, "the run is exported")

    (report,) = exporter.reports
    assert record.result is not None
    assert (report.key, report.agent_id, report.session_id) == ("r1", "a", "s1")
    assert (report.attempts, report.labels) == (1, {"team": "blue"})
    assert [(call.kind, call.name) for call in report.calls] == [
        ("model", "scripted"),
        ("tool", "calc"),
        ("model", "scripted"),
    ]
    metrics = [call.metrics for call in report.calls if call.metrics is not None]
    assert sum(each.input_tokens for each in metrics) == record.usage.input_tokens
    assert [each.attempt for each in metrics] == [1, 1]
    assert all(call.began_at <= call.ended_at for call in report.calls)
    assert report.result.usage.llm_latency_p50_ms is not None
    assert report.error_snapshot is None
    shown = repr([report.calls, report.labels, report.result.metadata])
    assert SECRET not in shown
    assert "1+1" not in shown


async def test_a_failed_run_has_a_snapshot(redis_url: str) -> None:
    """Its error, its last tool calls and the last messages of its session, masked and cut."""
    sums = [calls(("calc", {"expression": "1+1"})), calls(("calc", {"expression": "2+2", "api_key": "k-1"}))]
    failing = shop(llm=scripted(*sums, {"error": "response"}), pattern={"type": "react"})
    diagnostics = {"error_snapshot_last_n": 1, "redact_keys": ["iban"]}
    async with process(redis_url, failing, agent("b"), diagnostics=diagnostics) as p:
        before = await p.run("r0", agent_id="b", input_text="hi")
        record = await p.run()

    assert before.result is not None
    assert "error_snapshot" not in before.result.metadata
    assert record.result is not None
    snapshot: Any = record.result.metadata["error_snapshot"]
    assert (snapshot["run_id"], snapshot["error_type"]) == ("r1", "LLMResponseError")
    assert snapshot["error_code"] == "llm.response"
    assert snapshot["error_message"].startswith("scripted: the request was refused")
    assert snapshot["tool_call_chain"] == [
        {"tool_id": "calc", "params": {"expression": "2+2", "api_key": "***"}}
    ]
    assert [(each["role"], each["content"]) for each in snapshot["last_transcript"]] == [
        ("assistant", "hello")
    ]
    assert snapshot["captured_at"].endswith("+00:00")


async def test_an_exporter_of_the_original_gets_what_it_expects(redis_url: str) -> None:
    """And cannot change the result."""
    exporter = Original()
    failing = shop(llm=scripted(calls(("calc", {"expression": "1+1"})), {"error": "response"}))
    async with exported(redis_url, exporter, failing) as p:
        record = await p.run()
        await await_for(lambda: exporter.ended, "the run is exported")

    ((result, snapshot),) = exporter.ended
    assert (result.run_id, result.stop_reason) == ("r1", StopReason.FAILED)
    assert [(run_id, each.error) for run_id, each in exporter.calls] == [("r1", None), ("r1", "llm.response")]
    assert (snapshot.error_code, snapshot.agent_id) == ("llm.response", "a")
    assert snapshot.tool_call_chain == [{"tool_id": "calc", "params": {"expression": "1+1"}}]
    assert record.usage.llm_calls == 1


async def test_a_run_that_ended_without_a_worker_is_exported(redis_url: str) -> None:
    """Cancelled while it waited. A later life is another report, with a key of its own."""
    exporter = Kept()
    async with exported(redis_url, exporter) as p:
        await p.submit()
        await p.store.run(scripts.cancel(run_id="r1", reason="", force=True))
        await await_for(lambda: len(exporter.reports) == 1, "the run is exported")
        await p.store.run(
            scripts.resume(run_id="r1", agent_id="a", session_id="s1", input_text="", checkpoint_id="")
        )
        await p.execute()
        await await_for(lambda: len(exporter.reports) == 2, "its second life is exported")

    cancelled, completed = exporter.reports
    assert (cancelled.key, cancelled.result.stop_reason) == ("r1", StopReason.CANCELLED)
    assert (completed.key, completed.result.stop_reason) == ("r1:2", StopReason.COMPLETED)


async def test_a_report_that_fails_comes_again_and_is_dropped_in_the_end(
    redis_url: str,
) -> None:
    """The run has ended long before."""
    exporter = Kept()
    exporter.problems = [ConnectionError("nobody answers")] * 2
    async with exported(redis_url, exporter, shop(llm=scripted(*[{"text": "hi"}] * 9))) as p:
        await p.run()
        await await_for(lambda: exporter.reports, "the third try succeeds")
        exporter.problems = [ValueError("no")] * MAX_TRIES
        assert (await p.run("r2")).result is not None
        await await_for(lambda: not exporter.problems, "all tries have failed")
        await p.run("r3")
        await await_for(lambda: len(exporter.reports) == 2, "the next run is exported")

    assert [report.key for report in exporter.reports] == ["r1", "r3"]


async def test_an_exporter_that_exits_does_not_end_the_reports(redis_url: str) -> None:
    """Its library may call `sys.exit`. That counts as an exception: the report comes again."""
    exporter = Kept()
    exporter.problems = [SystemExit(1)]
    async with exported(redis_url, exporter) as p:
        await p.run()
        await await_for(lambda: exporter.reports, "the second try succeeds")


async def test_a_slow_exporter_holds_a_bounded_number_of_reports(redis_url: str) -> None:
    """Further reports wait in Redis."""
    exporter = Kept()
    exporter.gate.clear()
    async with process(redis_url, shop()) as p:
        await p.run()
        record = await p.record()
        export = RunExport(p.store, exporter, name="test")
        end = scripts.RunEnd("r1", record.life)
        waiting = [export.deliver(end) for _ in range(MAX_WAITING)]
        tasks = [asyncio.ensure_future(each) for each in waiting]
        await await_for(lambda: export._waiting == MAX_WAITING, "the queue is full")
        with pytest.raises(RuntimeError, match="wait for the exporter"):
            await export.deliver(end)
        exporter.gate.set()
        await asyncio.gather(*tasks)

    assert [report.key for report in exporter.reports] == ["r1"] * MAX_WAITING


async def test_an_exporter_that_hangs_does_not_keep_the_worker_from_ending(redis_url: str) -> None:
    """Its report is exported by another worker."""
    exporter = Kept()
    exporter.gate.clear()
    async with exported(redis_url, exporter) as p:
        await p.run()
        await await_for(
            lambda: any(each.name == "openagents-diagnostics" for each in threading.enumerate()),
            "the exporter works",
        )
        hung = next(each for each in threading.enumerate() if each.name == "openagents-diagnostics")
        assert hung.daemon
    second = Kept()
    async with exported(redis_url, second):
        await await_for(lambda: second.reports, "another worker has exported it")
    assert [report.key for report in second.reports] == ["r1"]


class ToFile(DiagnosticsExporter):
    """Appends the key of each report to a file."""

    class Config(DiagnosticsExporter.Config):
        path: Path

    def export(self, report: RunReport) -> None:
        with self.cfg.path.open("a") as file:
            file.write(f"{report.key}\n")


def test_a_worker_exports_to_what_its_agents_file_names(redis_url: str, tmp_path: Path) -> None:
    """The whole way: section, plugin, worker process, outbox."""
    kept = tmp_path / "runs.txt"
    ref = {"impl": f"{__name__}.ToFile", "config": {"path": str(kept)}}
    agents = tmp_path / "agents.json"
    agents.write_text(json.dumps({"agents": [agent()], "diagnostics": ref}))
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_CONFIG": str(agents)})
    with AgentsWorker(config_of(agents, settings), settings, None).running() as worker:
        ids = []

        def is_exported() -> bool:  # runs that end before the worker has registered its exporter are not
            ids.append(worker.run("a", "hi").run_id)
            return kept.exists()

        wait_for(is_exported, "a run is exported")

    assert set(kept.read_text().splitlines()) <= set(ids)
