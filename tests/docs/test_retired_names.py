"""The names of the code: no module, class or function has a name that the project has replaced."""

from __future__ import annotations

from bench.structure import (
    RETIRED_CLASSES,
    RETIRED_FUNCTIONS,
    RETIRED_MODULES,
    retired_names,
    retired_words,
)

ALLOWED = {
    "runtime/place.py: _place": "goes with the replay by place",
    "runtime/place.py: place": "goes with the replay by place",
    "store/keys.py: notices": "the name of the key",
}
"""Names that stay, and why. An entry that is not needed fails."""


def test_no_module_class_or_function_has_a_retired_name() -> None:
    """`bench/structure.py` lists the retired names and what stands in their place."""
    found = set(retired_names())

    assert sorted(found - set(ALLOWED)) == []
    assert sorted(set(ALLOWED) - found) == [], "no longer needed in ALLOWED"


def test_no_text_of_the_library_or_its_pages_has_a_retired_word() -> None:
    """Words with a meaning in another project's format are listed beside the retired ones."""
    assert list(retired_words()) == []


def test_each_retired_name_has_a_replacement() -> None:
    """A reader who meets the failure above learns what to write."""
    tables = (RETIRED_MODULES, RETIRED_CLASSES, RETIRED_FUNCTIONS)

    assert [name for table in tables for name, replacement in table.items() if not replacement] == []
