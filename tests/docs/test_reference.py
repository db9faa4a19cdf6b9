"""The reference pages say something of each setting, field, command and exit code."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest
from pydantic import BaseModel

from openagents_worker import agents
from openagents_worker.cli.exits import Exit
from openagents_worker.models import RunBudget, RunRecord, RunRequest, RunResult, RunUsage
from openagents_worker.settings import PREFIX, Settings
from tests.docs.blocks import ROOT

DOCS = ROOT / "docs"


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`docs/reference.py`, as `docs/generate.py` imports it."""
    monkeypatch.syspath_prepend(str(DOCS))
    import reference

    return sys.modules[reference.__name__]


def test_every_setting_has_advice(reference: ModuleType) -> None:
    """Advice on when to change a setting stands in `docs/reference.toml`: write a line for a new one."""
    assert reference.settings_without_advice() == []


def test_every_text_beside_the_code_is_shown(reference: ModuleType) -> None:
    """A text about a setting or a field that is gone, or that describes itself, is shown nowhere."""
    assert reference.texts_without_reader() == []


def test_the_page_of_settings_names_each_of_them() -> None:
    """With a meaning and advice: no cell is empty."""
    page = (DOCS / "settings.md").read_text()
    rows = {row[1]: row[0] for row in re.finditer(rf"^\| `({PREFIX}\w+)` \|.*$", page, re.MULTILINE)}
    assert {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} <= rows.keys()
    assert [row for row in rows.values() if "|  |" in row] == []


@pytest.mark.parametrize(
    "model",
    [
        agents.AppConfig,
        agents.AgentDefinition,
        agents.LLMOptions,
        agents.LLMPricing,
        agents.LLMRetryOptions,
        agents.ToolRef,
        agents.MemoryRef,
        agents.RuntimeOptions,
        RunBudget,
        agents.LoggingConfig,
    ],
)
def test_the_page_of_the_agents_file_explains_each_field(model: type[BaseModel]) -> None:
    """Every field has a row, and the row says what it means."""
    page = (DOCS / "agents-file.md").read_text() + (DOCS / "memory.md").read_text()
    assert unexplained(model, page) == []


@pytest.mark.parametrize("model", [RunRequest, RunResult, RunUsage, RunBudget])
def test_the_page_of_the_producer_explains_each_field(model: type[BaseModel]) -> None:
    """What a request may have, and what a result has."""
    assert unexplained(model, (DOCS / "producer.md").read_text()) == []


def test_the_pages_of_runs_name_each_field_of_a_record() -> None:
    """What `record()` and `runs()` return. `duration_ms` is not the time between the start and the end."""
    pages = "".join((DOCS / name).read_text() for name in ("producer.md", "listing.md"))

    assert [
        name for name in RunRecord.model_fields if f"`{name}`" not in pages and f".{name}" not in pages
    ] == []


def unexplained(model: type[BaseModel], page: str) -> list[str]:
    """Fields without a row, or with a row that does not say what they mean."""
    return [
        name
        for name in model.model_fields
        if not re.search(rf"^\| `{name}` \|.*\| [^|\n]*\w[^|\n]* \|$", page, re.MULTILINE)
    ]


def test_every_exit_code_has_a_meaning(reference: ModuleType) -> None:
    """On the page of the command line."""
    assert set(reference.EXITS) == set(Exit)
