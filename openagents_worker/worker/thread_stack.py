"""Stacks of threads: the only place that reads the frames of another thread."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import accumulate, chain, islice, repeat
from operator import itemgetter
from types import FrameType
from typing import Any

__all__ = ["frames_of"]


def frames_of(thread_id: int) -> list[FrameType]:
    """The frames of a thread, the innermost one first; an empty list if no thread has this id.

    They are read within one call in C, in which no other thread can go on. Python 3.11 may read freed memory
    if the thread has left a frame before its `f_back` is read (https://github.com/python/cpython/issues/111363).
    """
    frames: deque[FrameType | None] = deque()
    snapshots: Iterator[Mapping[int, FrameType]] = iter(sys._current_frames, None)
    innermost: Iterator[Any] = islice(map(itemgetter(thread_id), snapshots), 1)
    with suppress(
        KeyError, AttributeError
    ):  # AttributeError: behind the outermost frame, which ends with None
        frames.extend(accumulate(chain(innermost, repeat("f_back")), getattr))
    return [frame for frame in frames if frame is not None]
