"""Lines at the bottom of a terminal that change. The only place that draws over what was printed.

It needs `rich`, which the extra `worker` brings. Without it, or without a terminal, nothing is drawn.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NoReturn, Self

from openagents_worker.cli.terminal import Safe, message_lines_go_to

__all__ = ["LiveRegion", "can_draw"]

REDRAWS_PER_S = 8
ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process. Python does not clean up for them."""


def can_draw() -> bool:
    """Whether standard error is a terminal whose cursor can be moved, and `rich` is installed."""
    encoding = (getattr(sys.stderr, "encoding", None) or "").lower().replace("-", "")
    has_cursor = sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return has_cursor and encoding == "utf8" and find_spec("rich") is not None


class LiveRegion:
    """During a `with` block, the lines that `lines()` returns are drawn at the bottom of standard error.

    They are drawn again a few times a second, by a thread. Messages are printed above them. With `whole` they
    fill the terminal, and what was there before comes back at the end.
    """

    def __init__(self, lines: Callable[[], Sequence[Safe]], *, whole: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        self._lines = lines
        self._whole = whole
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False, soft_wrap=False)
        self._live = Live(
            console=self._console,
            refresh_per_second=REDRAWS_PER_S,
            transient=not whole,
            screen=whole,
            redirect_stdout=False,
            redirect_stderr=False,
            get_renderable=self._drawn,
        )
        self._messages = message_lines_go_to(self._print_above)
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, _exit) for number in ENDING}
        try:
            self._live.start(refresh=True)
            self._messages.__enter__()
        except BaseException:  # Ctrl-C: the terminal is left as it was
            self._live.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._messages.__exit__(kind, error, tb)
        self._live.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def refresh(self) -> None:
        """Draw the lines now."""
        self._live.refresh()

    def _print_above(self, text: Safe) -> None:
        from rich.text import Text

        self._console.print(Text.from_ansi(text.removesuffix("\n")), soft_wrap=True)

    def _drawn(self) -> Any:
        """The lines that fit: the last ones, or with `whole` the first ones. A long line is cut."""
        from rich.text import Text

        height = max(1, self._console.height - (0 if self._whole else 1))
        lines = self._lines()
        kept = lines[:height] if self._whole else lines[-height:]
        return Text("\n").join(_cut(Text.from_ansi(line), self._console.width) for line in kept)


def _exit(number: int, _frame: object) -> NoReturn:
    """Leave the `with` block, so that the cursor and the screen come back."""
    raise SystemExit(128 + number)


def _cut(text: Any, width: int) -> Any:
    text.truncate(width, overflow="ellipsis")
    return text
