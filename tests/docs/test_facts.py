"""Facts that pages state in their prose: figures are those of the code, and paths and targets exist."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from tests.docs.blocks import ROOT

_CODE = re.compile(r"`([^`\n]+)`")

FIGURES = {
    ("pools.md", r"after ([\d,]+) new objects"): "worker.interpreter.GC_THRESHOLD",
    ("pools.md", r"new objects instead of (\d+)"): "worker.interpreter.PYTHONS_GC_THRESHOLD",
    ("pools.md", r"between threads after (\d+) ms"): "worker.interpreter.SWITCH_INTERVAL_MS",
    ("pools.md", r"process instead of (\d+) ms"): "worker.interpreter.PYTHONS_SWITCH_INTERVAL_MS",
    ("plugins.md", r"within (\d+) s"): "runtime.deps.LIMIT_S",
    ("listing.md", r"examines at most ([\d,]+) runs"): "store.index_pages.MAX_SCANNED",
    ("listing.md", r"searches the ([\d,]+) most"): "store.listing.SCANNED_FOR_PROBLEMS",
    ("logging.md", r"again after (\d+) s"): "worker.stall_monitor.START_AGAIN_S",
    ("streaming.md", r"contains the first ([\d,]+) characters"): "redaction.MAX_CHARS",
    ("events.md", r"cut after ([\d,]+) characters"): "redaction.MAX_CHARS",
    ("streaming.md", r"unreachable for more than (\d+) seconds"): "store.watch.RECONNECT_S",
    ("streaming.md", r"Up to (\d+) messages wait"): "store.pubsub.INBOX_MESSAGES",
    ("sentinel.md", r"survives up to (\d+) s without"): "store.watch.RECONNECT_S",
    ("producer.md", r"An id has 1 to (\d+) printable"): "models.MAX_ID_CHARS",
    ("listing.md", r"up to (\d+) `labels`"): "models.MAX_LABELS",
    ("models.md", r"by the first call after (\d+) s"): "llm.api_keys.FILE_CHECK_S",
    ("models.md", r"It has (\d+) s\."): "llm.api_keys.RESOLVER_TIMEOUT_S",
    ("models.md", r"is continued, up to (\d+) times"): "llm.anthropic_messages.MAX_PAUSES",
    ("models.md", r"Up to (\d+) idle ones"): "llm.connection_pool.MAX_IDLE",
    ("models.md", r"are kept for (\d+) seconds"): "llm.connection_pool.IDLE_S",
    (
        "messages.md",
        r"tool messages in the transcript \| ([\d,]+);",
    ): "llm.transcript.MAX_TOOL_MESSAGES_BYTES",
    (
        "messages.md",
        r"`provider_fields` in the transcript \| ([\d,]+)",
    ): "llm.transcript.MAX_ANSWER_FIELDS_BYTES",
}
"""A page and the text around a figure, and the constant that the figure must equal."""


@pytest.mark.parametrize(("page", "text"), FIGURES, ids=str)
def test_a_figure_of_a_page_is_that_of_the_code(page: str, text: str) -> None:
    """The prose says what the constant says."""
    module, _, name = FIGURES[page, text].rpartition(".")
    value = getattr(import_module(f"openagents_worker.{module}"), name)
    value = value[0] if isinstance(value, tuple) else value

    prose = " ".join((ROOT / "docs" / page).read_text().split())
    found = re.findall(text, prose)

    assert found, f"docs/{page} no longer says {text!r}"
    assert {int(figure.replace(",", "")) for figure in found} == {round(value)}


def test_what_the_page_for_contributors_names_exists() -> None:
    """Its paths, its packages, the names in its code, and the targets of make."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    spans = [span for span in _CODE.findall(page) if "*" not in span and "NAME" not in span]
    makefile = (ROOT / "Makefile").read_text()
    targets = {span.split()[1] for span in spans if span.startswith("make ")}
    paths = [span for span in spans if re.fullmatch(r"[\w./-]*(/|\.(py|md|toml))[\w./-]*", span)]

    assert [target for target in sorted(targets) if f"\n{target}:" not in makefile] == []
    assert len(paths) > 20
    places = (ROOT, ROOT / "openagents_worker")
    assert [path for path in paths if not any((place / path).exists() for place in places)] == []
