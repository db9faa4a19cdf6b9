"""The words of the pages: each word of the glossary is in use, and no page uses a word that was replaced."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.docs.blocks import ROOT, pages

GLOSSARY = ROOT / "docs" / "glossary.md"
PAST = {"CHANGELOG.md"}

OURS = {
    *("attempt", "call id", "checkpoint", "drain", "fence", "heartbeat", "incarnation", "journal", "latch"),
    *("lease", "life", "overlay", "poisoned", "rescue loop", "run", "session", "suspect", "wake-up"),
}
"""Words that this library has chosen itself: a reader can look them up nowhere else."""

RETIRED = {
    r"carr(y|ies|ied|ier|iers|ying)": "execute (a run); contain, pass",
    r"crew": "process provider",
    r"door|doors": "script function; input",
    r"intake": "message",
    r"lane|lanes": "connection pool; pipeline",
    r"ledger": "run writer; log",
    r"note_of_run|untold|tellings": "notified, emit",
    r"outlook": "attempt outcome",
    r"told|telling": "notified, reported, shown",
    r"throws? [^.|]{0,30}away|thrown away": "evict, delete",
    r"is away|are away|was away": "is unreachable",
    r"(?<!there )(is|are) (no|none) (?!longer|more\b|other\b)": "is not",
    r"for ever": "forever",
}
"""Words that were replaced, as expressions, and what stands in their place."""

ALLOWED: dict[tuple[str, str], str] = {}
"""A page and a word that stands there still, and why. The list only shrinks: what is not needed fails."""

_ROW = re.compile(r"^\| (?P<term>[a-z][^|`]*?) \| (?P<meaning>[^|]+) \|$", re.MULTILINE)
_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")


def terms() -> dict[str, str]:
    """The glossary: its words and their meanings."""
    rows = [(row["term"], row["meaning"]) for row in _ROW.finditer(GLOSSARY.read_text())]
    return {term: meaning for term, meaning in rows if term != "term"}


@cache
def _everything() -> str:
    """All pages but the glossary, and the library's sources, with spaces between the parts of a word."""
    files = [page for page in pages() if page != GLOSSARY]
    for kind in ("*.py", "*.lua"):
        files += (ROOT / "openagents_worker").rglob(kind)
    return _spaced("\n".join(file.read_text() for file in files))


def _spaced(text: str) -> str:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return re.sub(r"[\s_-]+", " ", apart).lower()


def test_every_word_of_the_glossary_is_in_use() -> None:
    """In a page or in the code, with the spelling that a reader would look up."""
    assert [term for term in terms() if not re.search(rf"\b{_spaced(term)}", _everything())] == []


def test_the_glossary_explains_our_own_words() -> None:
    """Each once, in one line."""
    assert sorted(OURS - terms().keys()) == []
    listed = [row["term"] for row in _ROW.finditer(GLOSSARY.read_text()) if row["term"] != "term"]
    assert sorted(listed) == sorted(set(listed))


@pytest.mark.parametrize("word", RETIRED)
def test_no_page_uses_a_word_that_was_replaced(word: str) -> None:
    """In its prose: code keeps its names until they change."""
    pattern = re.compile(rf"\b({word})\b" if word[-1].isalpha() else rf"\b({word})", re.IGNORECASE)
    found = {name: pattern.search(_prose(name)) for name in _names()}
    with_it = {name for name, hit in found.items() if hit is not None}
    allowed = {page for page, each in ALLOWED if each == word}
    shown = [f"{name}: {hit[0]!r}" for name, hit in found.items() if hit and name not in allowed]
    assert shown == [], f"write instead: {RETIRED[word]}"
    assert sorted(allowed - with_it) == [], "no longer needed in ALLOWED"


def test_each_exception_has_a_reason_and_a_word() -> None:
    """An entry of ALLOWED names a page that exists and a word of RETIRED."""
    assert [key for key in ALLOWED if key[0] not in _names() or key[1] not in RETIRED] == []
    assert all(ALLOWED.values())


def _names() -> list[str]:
    names = [str(page.relative_to(ROOT)) for page in pages()]
    return [name for name in names if name not in PAST]


@cache
def _prose(page: str) -> str:
    text = (ROOT / page).read_text()
    return " ".join(_CODE.sub(" ", _FENCED.sub(" ", text)).split())
