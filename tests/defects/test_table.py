"""The table is complete: each defect of the original SDK has a test, or cannot occur."""

from __future__ import annotations

from tests.defects.table import defects, marked_tests, rows

ALL = 85
MOST_PREVENTED = 14
MUST_BE_HELD = ("P", "A", "B", "D05", "D10", "D11", "E03", "E06", "E11", "X02", "C02", "L")
"""The ids, or their beginnings, of the parts that this library has."""


def test_every_defect_is_held_by_a_test_or_cannot_occur() -> None:
    """Only parts that do not exist yet may have neither."""
    found = defects()
    assert len(found) == ALL
    unheld = [each.id for each in found if not each.tests and each.prevented is None]
    assert [id_ for id_ in unheld if id_.startswith(MUST_BE_HELD)] == []
    assert sum(each.prevented is not None for each in found) <= MOST_PREVENTED
    assert [each.id for each in found if each.is_later and (each.tests or each.prevented)] == []
    assert unheld == [each.id for each in found if each.is_later]


def test_every_mark_names_a_defect() -> None:
    assert set(marked_tests()) <= {each.id for each in defects()}
    assert len(list(rows())) == 2 * ALL
