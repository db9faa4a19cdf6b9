"""The table is complete: each defect of the original SDK has a test, or cannot occur."""

from __future__ import annotations

from tests.defects.table import defects, marked_tests, rows

ALL = 85
MOST_PREVENTED = 14


def test_every_defect_is_held_by_a_test_or_cannot_occur() -> None:
    """Not both: a test is the better proof."""
    found = defects()
    assert len(found) == ALL
    assert [each.id for each in found if bool(each.tests) == bool(each.prevented)] == []
    assert sum(each.prevented is not None for each in found) <= MOST_PREVENTED


def test_every_mark_names_a_defect() -> None:
    assert set(marked_tests()) <= {each.id for each in defects()}
    assert len(list(rows())) == 2 * ALL + sum(each.revert is not None for each in defects())
