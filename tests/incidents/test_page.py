"""The page about incidents and its tests belong together."""

from __future__ import annotations

import re
from pathlib import Path

from tests.incidents.scene import rows


def test_each_row_of_the_page_has_a_test() -> None:
    """And each test has a row. Add both: a row is a promise to somebody who is woken at night."""
    folder = Path(__file__).parent
    tested = [
        symptom
        for file in ("test_deployment.py", "test_runs.py")
        for symptom in re.findall(r'site\.scene\("([^"]+)"\)', (folder / file).read_text())
    ]

    assert sorted(tested) == sorted(rows())


def test_each_row_shows_something_and_says_what_to_do() -> None:
    """What is shown stands in backquotes, so that its test can look for it."""
    assert [row.symptom for row in rows().values() if not row.shown or len(row.todo) < 20] == []
