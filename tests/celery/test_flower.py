"""Flower with our options: tasks show the run and the reason of a wait, and the buttons work."""

from __future__ import annotations

import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.models import RunState
from tests.celery.shop import PATIENCE_S, Shop, ask, open_shop
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
CONFIG = f"--conf={ROOT / 'config' / 'flowerconfig.py'}"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    with open_shop(tmp_path_factory.mktemp("flower")) as shop:
        yield shop


@pytest.fixture(scope="module")
def flower(shop: Shop) -> str:
    """With config/flowerconfig.py, on loopback, without a password, with enabled buttons."""
    return shop.start_flower(CONFIG, FLOWER_READ_ONLY="0")


def post(url: str, **headers: str) -> int:
    request = urllib.request.Request(url, method="POST", headers=headers)  # noqa: S310 - http to this machine
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_task_in_flower_shows_its_run_and_why_it_waits(shop: Shop, flower: str) -> None:
    """Agent, session and run in its arguments; the reason as a text."""
    failed = shop.run_agent.delay(shop.request("fails"))
    later = shop.run_agent.delay(shop.request("later ok"))
    assert failed.wait(PATIENCE_S).stop_reason == "failed"

    def row(run_id: str) -> dict[str, Any]:
        return dict(ask(f"{flower}/api/task/info/{run_id}") or {})

    wait_for(lambda: row(failed.id).get("state") == "FAILURE", "Flower shows the failure", timeout=PATIENCE_S)
    wait_for(lambda: row(later.id).get("state") == "RETRY", "Flower shows the retry", timeout=PATIENCE_S)
    record = failed.record()
    assert row(failed.id)["args"] == f"agent={record.agent_id} session={record.session_id} run={failed.id}"
    assert record.reason_code is not None
    assert record.reason_code in table_row(flower, failed.id)["exception"]
    assert table_row(flower, later.id)["exception"] == "llm.rate_limit, retry after 60 s"
    later.cancel()


def table_row(flower: str, run_id: str) -> dict[str, Any]:
    """The data of a task on Flower's page of tasks."""
    query = (
        "draw=1&start=0&length=50&order[0][column]=0&order[0][dir]=asc&columns[0][data]=name&search[value]="
    )
    rows = ask(f"{flower}/tasks/datatable?{query}")["data"]
    return next(dict(row) for row in rows if row["uuid"] == run_id)


def test_a_registered_app_has_our_pages(shop: Shop, flower: str) -> None:
    """In the Flower of an app that exists: `register(app)` is enough."""
    handle = shop.run_agent.delay(shop.request("ok"))
    handle.wait(PATIENCE_S)

    assert handle.id in ask(f"{flower}/runs")
    assert "Timeline" in ask(f"{flower}/run/{handle.id}")
    assert 'href="/runs"' in ask(f"{flower}/tasks")


def test_a_bare_flower_does_not_start_open_to_others(shop: Shop) -> None:
    """Without any configuration file."""
    command = [sys.executable, "-m", "celery", "-A", "tests.celery.product:app", "flower"]
    refused = subprocess.run(
        [*command, "--address=0.0.0.0", "--port=0"],
        env=dict(shop.env),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    assert refused.returncode == 2
    assert "without a password" in refused.stderr


def test_terminate_cancels_a_run(shop: Shop, flower: str) -> None:
    """From Flower's own page, without a password; not from another site in the user's browser."""
    handle = shop.run_agent.delay(shop.request("hangs"))
    shop.wait_asked(handle)
    terminate = f"{flower}/api/task/revoke/{handle.id}?terminate=true"
    port = flower.rpartition(":")[2]

    assert post(terminate, Origin="https://evil.example") == 403
    assert post(terminate, **{"Sec-Fetch-Site": "cross-site"}) == 403
    assert post(terminate, Host=f"evil.example:{port}") == 403
    assert handle.record().state is RunState.RUNNING
    assert post(terminate, Origin=flower, **{"Sec-Fetch-Site": "same-origin"}) == 200
    assert handle.wait(PATIENCE_S).stop_reason == "cancelled"


def test_no_other_site_may_read_the_api(flower: str) -> None:
    """Flower allows every origin if it has no authentication."""
    with urllib.request.urlopen(f"{flower}/api/workers", timeout=PATIENCE_S) as answer:  # noqa: S310
        assert answer.headers["Access-Control-Allow-Origin"] is None


@pytest.mark.ui
def test_a_person_terminates_a_run(shop: Shop, flower: str, tmp_path: Path) -> None:
    """In a real browser: one click on the button ends the run."""
    driver = shutil.which("chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    if driver is None:
        pytest.skip("needs chromium and its driver (Debian: chromium-driver)")
    handle = shop.run_agent.delay(shop.request("hangs"))
    shop.wait_asked(handle)
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        browser.get(f"{flower}/task/{handle.id}")
        browser.find_element("id", "task-terminate").click()
        assert handle.wait(PATIENCE_S).stop_reason == "cancelled"
    finally:
        browser.quit()


def test_a_bare_flower_serves_the_figures_of_the_fleet(shop: Shop) -> None:
    """Beside its own. The configuration file of this repository is not needed for them."""
    flower = shop.start_flower()

    text = str(ask(f"{flower}/metrics"))

    assert "openagents_fleet_up 1.0" in text
    assert 'openagents_fleet_workers{state="alive"}' in text
    assert "flower_events_total" in text


def test_the_figures_of_the_fleet_are_served_once(shop: Shop, flower: str) -> None:
    """Prometheus refuses series that come twice."""
    text = str(ask(f"{flower}/metrics"))

    assert text.count("\nopenagents_fleet_up ") == 1
