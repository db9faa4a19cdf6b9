"""The services of a process: what all its runs share."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.marks import Marks
from openagents_worker.runtime.reply_stream import ReplyPace
from openagents_worker.settings import Settings
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.scripts import Wake

__all__ = ["Services"]


@dataclass(frozen=True, slots=True)
class Services:
    """The services that a runner gives to each attempt.

    `send_wakes` sends wake-up messages. `leave(exit_code)` ends the process when code of a run cannot be
    stopped. `marks` show another process which code executes. `random_unit` returns a number from 0 to 1, for
    the jitter of retries. `reply_pace` counts the replies that are streamed.
    """

    store: AsyncStore
    assembly: Assembly
    settings: Settings
    send_wakes: Callable[[Sequence[Wake]], Awaitable[None]]
    leave: Callable[[int], object] = os._exit
    marks: Marks = field(default_factory=Marks)
    random_unit: Callable[[], float] = random.random
    reply_pace: ReplyPace = field(default_factory=ReplyPace)
