"""The exporters at their HTTP doors, beside the packages of the vendors, which send to the same server."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.support.deployment import ROOT

pytestmark = pytest.mark.extras

VENDORS = ("langfuse>=3", "arize-phoenix-otel>=0.10")


def declared() -> set[str]:
    """What the extras of the exporters bring."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {requirement for name in ("langfuse", "phoenix", "rich") for requirement in extras[name]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The program, in an environment with everything that this one has and the packages of the vendors."""
    folder = tmp_path_factory.mktemp("diagnostics")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *VENDORS, *declared()], check=True)
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(own) / "also.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    return subprocess.run(
        [python, "-m", "tests.extras.diagnostics_program"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def found(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-4000:]
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def to(found: dict[str, Any], whose: str, vendor: str) -> list[dict[str, Any]]:
    return [each for each in found[whose] if ("public" in each["path"]) == (vendor == "langfuse")]


@pytest.mark.parametrize("vendor", ["langfuse", "phoenix"])
def test_we_knock_at_the_door_of_the_vendors_package(found: dict[str, Any], vendor: str) -> None:
    """The same path, credentials and content type."""
    theirs, ours = (
        [(each["path"], each["authorization"], each["type"]) for each in to(found, whose, vendor)]
        for whose in ("theirs", "ours")
    )
    assert set(ours) == set(theirs)
    assert all(each[1] for each in ours)


def test_langfuse_knows_every_attribute(found: dict[str, Any]) -> None:
    """Those of Langfuse itself are the constants of its package; the others are OpenTelemetry's."""
    known = tuple(found["langfuse_attributes"])
    used = {
        name
        for each in to(found, "ours", "langfuse")
        for span in each["spans"]
        for name in span["attributes"]
        if name.startswith("langfuse.")
    }
    assert [name for name in sorted(used) if not name.startswith(known)] == []


@pytest.mark.parametrize("vendor", ["langfuse", "phoenix"])
def test_a_run_is_one_trace_with_its_calls(found: dict[str, Any], vendor: str) -> None:
    """With real times and stable ids, so that a run that is exported twice replaces itself."""
    good, bad, again = to(found, "ours", vendor)
    run, model, tool = good["spans"]
    assert [span["name"] for span in good["spans"]] == ["invoke_agent shop", "chat m-1", "execute_tool add"]
    assert [span["took_ms"] for span in good["spans"]] == [2000, 300, 1000]
    assert {span["trace_id"] for span in good["spans"]} == {found["trace_id"]}
    assert (run["parent"], {model["parent"], tool["parent"]}) == ("", {run["span_id"]})
    assert again["spans"] == good["spans"]
    assert {span["trace_id"] for span in bad["spans"]}.isdisjoint({found["trace_id"]})
    assert (run["failed"], tool["failed"]) == (False, True)


def test_each_vendor_finds_model_tokens_and_session(found: dict[str, Any]) -> None:
    """Under its own names."""
    run, model, _ = (span["attributes"] for span in to(found, "ours", "langfuse")[0]["spans"])
    assert run["session.id"] == "s1"
    assert run["langfuse.trace.metadata.llm_latency_p50_ms"] == 300.0
    assert model["langfuse.observation.type"] == "generation"
    assert (model["langfuse.observation.model.name"], model["gen_ai.usage.input_tokens"]) == ("m-1", 10)
    first = to(found, "ours", "phoenix")[0]
    run, model, _ = (span["attributes"] for span in first["spans"])
    assert first["resource"][0]["openinference.project.name"] == "shop"
    assert (run["openinference.span.kind"], model["openinference.span.kind"]) == ("AGENT", "LLM")
    assert (model["llm.model_name"], model["llm.token_count.prompt"]) == ("m-1", 10)


def test_a_failed_run_has_its_error_and_no_content(
    found: dict[str, Any], done: subprocess.CompletedProcess[str]
) -> None:
    """No answer and no arguments, also not in what rich prints. Its markup is printed as text."""
    bad = to(found, "ours", "phoenix")[1]["spans"][0]["attributes"]
    assert (bad["error.code"], bad["error.message"]) == ("tool.error", "[no] such item")
    assert "SECRET" not in json.dumps(found["ours"])
    assert "SECRET" not in done.stderr
    assert "tool.error: [no] such item" in done.stderr
    assert "run r1" in done.stderr


def test_a_refused_trace_is_an_error(found: dict[str, Any]) -> None:
    """So it is sent again later."""
    assert [failure.partition("/")[2][-40:] for failure in found["failures"]]
    assert all("has not accepted the trace" in failure for failure in found["failures"])
    assert len(found["failures"]) == 2
