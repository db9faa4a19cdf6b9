"""How easy the code is to read: the figures of `bench/structure.py`."""

from __future__ import annotations

import pytest

from bench.structure import (
    LIMITS,
    MEASURED,
    RETIRED_CLASSES,
    RETIRED_FUNCTIONS,
    RETIRED_MODULES,
    STAY,
    WIDE,
    WIDE_FIGURE,
    counted_in_sources,
    measured_in_a_run,
    names_of_the_list,
)


@pytest.fixture(scope="module")
def counted() -> dict[str, list[str]]:
    return counted_in_sources()


@pytest.mark.parametrize("figure", sorted(LIMITS.keys() - MEASURED))
def test_each_figure_is_within_its_limit(figure: str, counted: dict[str, list[str]]) -> None:
    """Retired words and names, long files, wide constructors, class names with two meanings."""
    assert len(counted[figure]) <= LIMITS[figure], "\n".join(counted[figure])


@pytest.mark.long
def test_a_message_and_a_model_call_pass_through_few_parts() -> None:
    """From the message to the pattern, and from the pattern to the model's server, in a real worker."""
    for figure, names in measured_in_a_run().items():
        assert len(names) <= LIMITS[figure], "\n".join([figure, *names])


def test_each_name_that_stays_is_still_there() -> None:
    assert sorted(STAY.keys() - set(names_of_the_list())) == []


def test_each_wide_constructor_that_stays_is_still_there(counted: dict[str, list[str]]) -> None:
    assert sorted(counted[WIDE_FIGURE]) == sorted(WIDE)


def test_each_retired_name_has_a_replacement() -> None:
    """A reader who meets a failure above learns what to write."""
    tables = (RETIRED_MODULES, RETIRED_CLASSES, RETIRED_FUNCTIONS)

    assert [name for table in tables for name, replacement in table.items() if not replacement] == []
