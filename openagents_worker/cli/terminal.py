"""The terminal. The only place where a command prints: nothing reaches it that `printable` has not seen.

A plain string is escaped when it is printed. `styled`, `joined` and `table` make `Safe` text: its parts are
escaped before colours are put around them. Text put together in any other way is plain again, and so is
escaped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import click

from openagents_worker.cli.streams import OutputLost
from openagents_worker.printable import json_escaped, one_line, printable

__all__ = ["Safe", "dump", "err", "joined", "out", "styled", "table", "width_of"]

SHORTEST_CELL = 8  # columns: below that a cell says nothing
GAP = "  "


class Safe(str):
    """Text that may be printed as it is."""

    __slots__ = ()


def safe(text: str) -> Safe:
    return text if isinstance(text, Safe) else Safe(printable(text))


def styled(text: str, **style: Any) -> Safe:
    """The text in colours and weights of `click.style`; without them where NO_COLOR is set."""
    is_plain = os.environ.get("NO_COLOR") or not any(style.values())
    return safe(text) if is_plain else Safe(click.style(safe(text), **style))


def joined(*parts: str, sep: str = "") -> Safe:
    return Safe(sep.join(map(safe, parts)))


def out(text: str = "") -> None:
    """A line on standard output: what the command was asked for. Raises `OutputLost`."""
    _write(safe(text))


def err(text: str = "") -> None:
    """A line on standard error: what goes on beside it. Where that cannot be written, nobody misses it."""
    _remark(f"{safe(text)}\n")


def piece(text: str) -> None:
    """A part of a line on standard error, shown at once."""
    _remark(safe(text))


def dump(value: Any) -> None:
    """One JSON value on a line of its own on standard output."""
    dump_text(json.dumps(value, ensure_ascii=False))


def dump_text(text: str) -> None:
    """JSON that is text already. Raises `OutputLost`."""
    _write(json_escaped(text))


def _write(line: str) -> None:
    try:
        click.echo(line)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(error) from error


def _remark(text: str) -> None:
    try:
        click.echo(text, nl=False, err=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def width_of(text: str) -> int:
    """Columns that the text takes, colours not counted."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in click.unstyle(text)
    )


def columns() -> int | None:
    """How wide the terminal is; None where standard output is not one: then nothing is cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    flexible: Sequence[str] = (),
    width: int | None = None,
) -> list[Safe]:
    """Lines of a table, the header first.

    Where it is wider than `width`, the `flexible` columns are cut, in that order; where that is not enough,
    each row is folded into some lines of `name value`.
    """
    cells = [[_cell(cell) for cell in row] for row in rows]
    widths = [max([width_of(name), *(width_of(row[at]) for row in cells)]) for at, name in enumerate(header)]
    for name in flexible if width is not None else ():
        at = header.index(name)
        widths[at] = max(min(widths[at], SHORTEST_CELL), widths[at] - max(0, _total(widths) - (width or 0)))
    if width is not None and _total(widths) > width:
        return [line for row in cells for line in _folded(header, row, width)]
    lines = [
        joined(*(_padded(cell, w) for cell, w in zip(row, widths, strict=True)), sep=GAP) for row in cells
    ]
    head = GAP.join(_padded(name, w) for name, w in zip(header, widths, strict=True))
    return [Safe(line.rstrip()) for line in (styled(head.rstrip(), dim=True), *lines)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _folded(header: Sequence[str], row: Sequence[Safe], width: int) -> list[Safe]:
    """A row as `name value` pairs on lines that fit, the first of them further out."""
    lines: list[Safe] = []
    for name, cell in zip(header, row, strict=True):
        if not cell:
            continue
        pair = joined(styled(name.lower(), dim=True), " ", cell)
        if lines and width_of(lines[-1]) + len(GAP) + width_of(pair) <= width:
            lines[-1] = joined(lines[-1], pair, sep=GAP)
        else:
            lines.append(joined(GAP, pair) if lines else pair)
    return lines


def _cell(text: str) -> Safe:
    return text if isinstance(text, Safe) else Safe(one_line(text))


def _padded(text: str, width: int) -> Safe:
    """Cut or filled up to this width; what is cut loses its colours."""
    cell = _cell(text)
    if width_of(cell) > width:
        cell = _cut(click.unstyle(cell), width)
    return Safe(cell + " " * (width - width_of(cell)))


def _cut(text: str, width: int) -> Safe:
    kept = ""
    for character in text:
        if width_of(kept + character) >= width:
            break
        kept += character
    return Safe(f"{kept}…")
