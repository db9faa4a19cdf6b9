"""The two editions of the tests are all of them; the short one is spread over each table."""

from __future__ import annotations

from typing import cast

import pytest

from tests.support.sampling import MOST, mark_beyond_the_share


class Item:
    """A case of a test, as far as marks are concerned."""

    def __init__(self, nodeid: str, *marks: pytest.MarkDecorator) -> None:
        self.nodeid = nodeid
        self.marks = {mark.name: mark.mark for mark in marks}

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks[mark.name] = mark.mark


def short(test: str, count: int, *marks: pytest.MarkDecorator) -> list[int]:
    """The numbers of the cases that `make test` runs."""
    items = [Item(f"{test}[{number}]", *marks) for number in range(count)]
    mark_beyond_the_share(cast("list[pytest.Item]", items))
    return [number for number, item in enumerate(items) if "long" not in item.marks]


def test_a_small_table_is_tried_whole() -> None:
    assert short("f", MOST) == list(range(MOST))


def test_of_a_large_table_some_cases_are_tried_at_equal_distances() -> None:
    assert short("f", MOST * 10) == list(range(0, MOST * 10, 10))
    assert len(short("f", MOST + 3)) == MOST


def test_a_test_says_how_much_it_costs() -> None:
    """One case is always tried."""
    assert short("f", 9, pytest.mark.share(of=4)) == [0, 4, 8]
    assert short("f", 2, pytest.mark.share(of=4)) == [0]
    assert short("f", 200, pytest.mark.share(of=1)) == list(range(200))


def test_what_has_a_mark_of_its_own_is_not_counted() -> None:
    """Otherwise a test whose first case is slow would not be in the short edition."""
    items = [Item("f[0]", pytest.mark.slow), Item("f[1]"), Item("f[2]")]
    for item in items:
        item.marks["share"] = pytest.mark.share(of=2).mark
    mark_beyond_the_share(cast("list[pytest.Item]", items))

    assert [item.nodeid for item in items if not {"long", "slow"} & set(item.marks)] == ["f[1]"]
