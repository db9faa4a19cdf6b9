"""docs/deployment.md: what it tells an operator to write is right."""

from __future__ import annotations

import configparser
import re
from typing import Any

import pytest
import yaml

from openagents_worker.settings import load_settings
from tests.deployment.commands import ROOT
from tests.deployment.compose import SERVICES

PAGE = (ROOT / "docs" / "deployment.md").read_text()
LONGEST_STOP_S = load_settings({}).drain_timeout_s + load_settings({}).time_limits.let_go_s


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # names as they are written
    unit.read_string(block("ini"))
    return unit["Service"]


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load(block("yaml"))["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize(
    "grace_s",
    [
        int(SERVICES["worker"]["stop_grace_period"].removesuffix("s")),
        int(service()["TimeoutStopSec"]),
        int(pod()["terminationGracePeriodSeconds"]),
    ],
    ids=["compose", "systemd", "kubernetes"],
)
def test_a_worker_is_given_the_time_that_it_needs_to_stop(grace_s: int) -> None:
    """To hand its runs over, with some seconds to spare; the page says the same in words."""
    assert grace_s >= LONGEST_STOP_S + 5
    assert f"{grace_s} seconds are enough" in PAGE


def test_systemd_leaves_the_processes_of_tools_alone() -> None:
    """It would otherwise end them before their worker can store what they return."""
    assert service()["KillMode"] == "mixed"
    assert service()["Restart"] == "always"


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_kubernetes_probes_reach_the_worker(probe: str) -> None:
    """At a port that the container opens for the outside, and at a path that the page explains."""
    (container,) = pod()["containers"]
    asked = container[probe]["httpGet"]
    (port,) = container["ports"]
    settings = load_settings({each["name"]: each["value"] for each in container["env"]})
    assert asked == {"path": "/readyz" if probe == "readinessProbe" else "/livez", "port": port["name"]}
    assert settings.health_port == settings.metrics_port == port["containerPort"]
    assert settings.monitoring_address == "0.0.0.0"  # noqa: S104 - the address of a pod is not known before
    assert f"`{asked['path']}`" in PAGE


def test_the_page_lists_the_checks_of_a_worker() -> None:
    """As they stand in the answer of `/readyz` in the tests of workers."""
    checks = re.findall(r"^\[\+\] ([a-z ]+): ok$", PAGE, re.MULTILINE)
    assert checks == ["event loop", "watchdog", "lease", "consumer", "accepts runs"]
    assert all(f"| {check} |" in PAGE for check in checks)


def test_every_setting_that_the_page_names_is_one() -> None:
    """With its default, where it gives one."""
    named = set(re.findall(r"OPENAGENTS_([A-Z_]+)", PAGE)) - {""}
    known = {name.upper() for name in type(load_settings({})).model_fields}
    assert named <= known
    assert f"`OPENAGENTS_DRAIN_TIMEOUT_S` ({load_settings({}).drain_timeout_s:g} seconds)" in PAGE
