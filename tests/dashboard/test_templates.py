"""Our parts of Flower's pages. An anchor that Flower has changed fails here, not in production."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flower
import pytest
from celery import Celery
from flower.options import default_options

from openagents_worker.celery.flower_pages import show_pages_in_flower
from openagents_worker.dashboard.flower_app import (
    FLOWERS_COLUMNS,
    FlowerWithPages,
    flower_for,
    show_runs_as_tasks,
)
from openagents_worker.dashboard.flower_options import format_task, tasks_columns
from openagents_worker.dashboard.templates import ANCHORS, PageTemplates, patched
from tests.dashboard.server import Server

TEMPLATES = Path(flower.__file__).parent / "templates"


@pytest.mark.parametrize("name", ANCHORS)
def test_the_template_of_flower_has_the_anchor(name: str) -> None:
    """Once, or the first place is the right one: before the first entry of the navigation."""
    text = (TEMPLATES / name).read_text()
    anchor, ours = ANCHORS[name]

    assert anchor in text
    assert patched(name, text).index(ours) == text.index(anchor)


def test_a_flower_without_the_anchor_still_has_its_page(caplog: pytest.LogCaptureFixture) -> None:
    assert patched("navbar.html", "<ul></ul>") == "<ul></ul>"
    assert "flower.not_patched" in caplog.text


def test_every_template_can_be_parsed() -> None:
    ours = Path(sys.modules[PageTemplates.__module__].__file__ or "").parent / "templates"
    loader = PageTemplates(str(TEMPLATES))

    for file in ours.glob("*.html"):
        loader.load(f"openagents/{file.name}")
    for file in TEMPLATES.glob("*.html"):
        loader.load(file.name)


async def test_a_task_of_flower_leads_to_its_run(server: Server) -> None:
    """Its list of tasks gets a script; a task gets a button."""
    page = " ".join((await server.text("/tasks")).split())

    assert '<script defer src="/openagents-static/tasks.js" data-runs="/runs">' in page


def test_flower_is_replaced_only_in_commands_of_celery(monkeypatch: pytest.MonkeyPatch) -> None:
    """A web process that makes an app imports nothing of Flower."""
    command: Any = SimpleNamespace(Flower=None, apply_env_options=lambda: None)
    monkeypatch.setitem(sys.modules, "flower.command", command)
    show_pages_in_flower()
    assert command.Flower.__name__ == "_flower"

    monkeypatch.delitem(sys.modules, "flower.command")
    show_pages_in_flower()
    assert "flower.command" not in sys.modules


def test_runs_are_rows_in_plain_words_unless_the_configuration_says_otherwise() -> None:
    """Also with a bare `celery -A tasks flower`: agent, session and run, and the reason of a wait."""
    assert default_options._options["tasks-columns"].default == FLOWERS_COLUMNS
    bare = SimpleNamespace(format_task=None, tasks_columns=FLOWERS_COLUMNS)
    own = SimpleNamespace(format_task=len, tasks_columns="name")

    show_runs_as_tasks(bare)
    show_runs_as_tasks(own)

    assert (bare.format_task, bare.tasks_columns) == (format_task, tasks_columns)
    assert (own.format_task, own.tasks_columns) == (len, "name")


def test_an_app_without_our_tasks_gets_flower_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        "openagents_worker.dashboard.flower_app.Flower", lambda **options: made.append(options) or "flower"
    )
    with Celery("shop", set_as_current=False) as app:
        assert flower_for(capp=app, options=SimpleNamespace(address="0.0.0.0")) == "flower"  # noqa: S104
    assert [options["capp"] for options in made] == [app]
    assert issubclass(FlowerWithPages, flower.app.Flower)
