"""Every link of a page to this repository leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, pages

_LINK = re.compile(r"\]\((?P<path>[^)\s:#]*)(?:#(?P<anchor>[^)\s]+))?\)")
_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headlines(page: Path) -> None:
    """Relative paths exist; what stands behind `#` is a headline there."""
    broken = []
    for link in _LINK.finditer(_FENCED.sub("", page.read_text())):
        target = page.parent / link["path"] if link["path"] else page
        if not target.exists() or (link["anchor"] and link["anchor"] not in anchors(target)):
            broken.append(link[0])
    assert broken == []


def test_every_page_of_the_documentation_is_in_its_index() -> None:
    """`docs/README.md` names each page once or more."""
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name}" not in index]
    assert sorted(missing) == ["README.md"]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headlines, as GitHub makes them."""
    lines = _FENCED.sub("", page.read_text()).splitlines()
    headlines = [line.lstrip("#").strip() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", headline.lower()).replace(" ", "-") for headline in headlines}
