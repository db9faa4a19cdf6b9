"""The script for the rows of a list on a page."""

from __future__ import annotations

from collections.abc import Sequence

from openagents_worker.store.scripts.calls import script_function

__all__ = ["read_rows"]


@script_function
def read_rows(*, kind: str, ids: Sequence[str], words: Sequence[str] = ()) -> tuple[tuple[str, ...], ...]:
    """For each id a row of the answers of Redis, of any type, in one command. Changes nothing.

    An answer may be an exception, as those of a pipeline. `store/row_reads.py` says what is read.
    """
