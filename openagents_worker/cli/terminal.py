"""The terminal. The only place where a command prints. All output is escaped with `printable`.

A plain string is escaped when it is printed. `styled`, `joined` and `table` return `Safe` text: they escape
its parts before they add colours. All other operations on `Safe` text return a plain string, which is escaped
when it is printed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import click

from openagents_worker.cli.streams import OutputLost
from openagents_worker.printable import json_escaped, one_line, printable

__all__ = ["Safe", "dump", "err", "joined", "message_lines_go_to", "out", "styled", "table", "width_of"]

MIN_CELL_WIDTH = 8  # columns: a narrower cell would not be readable
GAP = "  "


class Safe(str):
    """Text that is escaped already and may contain colours. It is printed unchanged."""

    __slots__ = ()


def safe(text: str) -> Safe:
    """Escape the text, unless that was done already."""
    return text if isinstance(text, Safe) else Safe(printable(text))


def styled(text: str, **style: Any) -> Safe:
    """The escaped text with the options of `click.style`; without them if NO_COLOR is set."""
    is_plain = os.environ.get("NO_COLOR") or not any(style.values())
    return safe(text) if is_plain else Safe(click.style(safe(text), **style))


def joined(*parts: str, sep: str = "") -> Safe:
    """Escape the parts and join them."""
    return Safe(sep.join(map(safe, parts)))


def out(text: str = "") -> None:
    """Print a line of the command's result to standard output. Raises `OutputLost`."""
    _write_result(safe(text))


def err(text: str = "") -> None:
    """Print a line to standard error: a message beside the result. An error of the stream is ignored."""
    _write_message(f"{safe(text)}\n")


def piece(text: str) -> None:
    """Print a part of a line to standard error and flush it."""
    _write_message(safe(text))


def dump(value: Any) -> None:
    """Print the value as one line of JSON to standard output. Raises `OutputLost`."""
    dump_text(json.dumps(value, ensure_ascii=False))


def dump_text(text: str) -> None:
    """Print a JSON text as one line to standard output. Raises `OutputLost`."""
    _write_result(json_escaped(text))


def _write_result(line: str) -> None:
    try:
        click.echo(line)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(error) from error


@contextmanager
def message_lines_go_to(print_message: Callable[[Safe], None]) -> Generator[None]:
    """During a `with` block, messages beside the result are passed to this function, escaped.

    For what draws on standard error: a message that is printed past it would be overwritten.
    """
    _printers.append(print_message)
    try:
        yield
    finally:
        _printers.remove(print_message)


_printers: list[Callable[[Safe], None]] = []


def _write_message(text: str) -> None:
    try:
        if _printers:
            _printers[-1](Safe(text))
        else:
            click.echo(text, nl=False, err=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def width_of(text: str) -> int:
    """The width of the text on a terminal, in columns. Colours are not counted."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in click.unstyle(text)
    )


def columns() -> int | None:
    """The width of the terminal, in columns. None: standard output is not a terminal, and nothing is cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    flexible: Sequence[str] = (),
    width: int | None = None,
) -> list[Safe]:
    """The lines of a table. The header is the first line.

    If the table is wider than `width`, the `flexible` columns are cut, in the given order. If it is still too
    wide, each row becomes a few lines of `name value` pairs. Without `width` nothing is cut.
    """
    cells = [[_cell(cell) for cell in row] for row in rows]
    widths = [max([width_of(name), *(width_of(row[at]) for row in cells)]) for at, name in enumerate(header)]
    for name in flexible if width is not None else ():
        at = header.index(name)
        widths[at] = max(min(widths[at], MIN_CELL_WIDTH), widths[at] - max(0, _total(widths) - (width or 0)))
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
    """A row as `name value` pairs, on lines that fit the width. All lines but the first are indented."""
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
    """The cell, cut or padded to this width. A cell that is cut loses its colours."""
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
