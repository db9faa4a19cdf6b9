"""Wrong wall clocks: the only place that sets the time of day of a worker."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["WallClocks"]

SOURCE = Path(__file__).resolve().parent / "clock.c"
OFFSETS_S = (0, 0, -420, 300, 0, -90, 900)
"""The wall clock of the n-th worker is off by the n-th number from its start, and so on in a circle."""


class WallClocks:
    """The wall clocks of workers. Without a C compiler, or on another system than Linux, they stay right."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._library = _compiled(folder)

    def environment(self, worker: str, number: int) -> dict[str, str]:
        """The environment of the n-th worker: its clock begins with the n-th offset."""
        if self._library is None:
            return {}
        self._write(worker, OFFSETS_S[number % len(OFFSETS_S)])
        return {"LD_PRELOAD": str(self._library), "CHAOS_CLOCK_FILE": str(self._file(worker))}

    def set(self, worker: str, offset_s: int) -> bool:
        """The clock of a running worker jumps; returns False if that is not possible."""
        if self._library is None:
            return False
        self._write(worker, offset_s)
        return True

    def _file(self, worker: str) -> Path:
        return self._folder / f"clock-{worker}"

    def _write(self, worker: str, offset_s: int) -> None:
        path = self._file(worker)
        path.touch()
        with path.open("r+b") as file:  # the worker has mapped this file
            file.write(offset_s.to_bytes(8, sys.byteorder, signed=True))


def _compiled(folder: Path) -> Path | None:
    """The library that makes a wall clock wrong; None, with a note, where it cannot be made."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        print("chaos: wall clocks stay right, because there is no C compiler", file=sys.stderr)
        return None
    path = folder / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(SOURCE)], check=True)  # noqa: S603
    return path
