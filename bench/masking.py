"""Masking: the cost of searching a text for secrets, and a check that it grows linearly with the length.

First, harmless texts as in events and log lines. Each event has a call id and texts of its own, so that the
caches of short texts do not answer for them. Then, for the beginning of each pattern, a text of half a
megabyte that repeats it, and a text of half that length. The longer text may cost at most three times as
much, which allows for the noise of the machine.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from openagents_worker.redaction import shown_json
from openagents_worker.secret_forms import mask_secrets, mask_url
from openagents_worker.secret_text import mask_prose

CHARS = 500_000
MAX_RATIO = 3.0
MAX_US_PER_CHAR = 5.0
PIECES = (
    "-", "_", ":", "=", "?", "&", "sk-", "ghp_", "AKIA", "AIza", "eyJ", "eyJaaaaaaaaa.", "SG.",
    "SG.aaaaaaaaaaaaaaaaaaaa.", "12345678:", "/services/", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----",
    "-----", "Bearer ", "Basic ", "://", "://a:", "://a:b ", "://a1", "://a:@b", "?token", "?token=a1&",
    "password=", "password:", "password='", 'password="x', "token:", "token='", "token=1,", "cookie:",
    "cookie: a", "cookie: =", "password=a(", "password :    ", "password=[", '\\"password\\":',
)  # fmt: skip
PROSE = "The quick brown fox said that the tokens of the request were counted twice, and so on; "
EVENT = {
    "tool_id": "search",
    "params": {"q": "how tall is the tower of Pisa", "n": 3},
    "call_id": "tool:search:3f0c9e2d:1",
    "output_text": (PROSE * 4)[:300],
}


def main(options: list[str]) -> int:
    """Print both tables. Return 1 if the cost of a text grows faster than its length."""
    print(f"{'an event, as JSON':<36}{_seconds(_showing_new_events(), 2_000) * 1e6:>10.1f} µs")
    for name, text in {"an id": "run-3f0c9e2d8a1b4c7e", "300 characters": (PROSE * 4)[:300]}.items():
        by_form = _seconds(lambda text=text: mask_secrets(text), 2_000)  # type: ignore[misc]
        prose = _seconds(lambda text=text: mask_prose(text), 2_000)  # type: ignore[misc]
        print(f"{name + ', by form / as prose':<36}{by_form * 1e6:>10.1f} µs{prose * 1e6:>10.1f} µs")
    plain = _seconds(lambda: mask_prose((PROSE * CHARS)[:CHARS])) / CHARS
    print(f"{'prose':<36}{plain * 1e6:>10.3f} µs a character\n")
    return max(_row(piece, mask) for piece in PIECES for mask in (mask_prose, mask_url))


def _showing_new_events() -> Callable[[], object]:
    """Shows an event whose call id and texts were not shown before."""
    numbers = itertools.count()

    def show() -> object:
        number = next(numbers)
        return shown_json(
            {
                **EVENT,
                "params": {"q": f"how tall is tower {number} of Pisa", "n": 3},
                "call_id": f"tool:search:{number:08x}:1",
                "output_text": f"{number} {EVENT['output_text']}",
            }
        )

    return show


def _row(piece: str, mask: Callable[[str], str]) -> int:
    half, whole = ((piece * CHARS)[:size] for size in (CHARS // 2, CHARS))
    one, two = _seconds(lambda: mask(half)), _seconds(lambda: mask(whole))
    is_wrong = two > MAX_RATIO * one + 0.01 or two / CHARS * 1e6 > MAX_US_PER_CHAR
    name = f"{piece!r} {mask.__name__}"
    print(
        f"{name:<46}{two / CHARS * 1e6:>8.3f} µs a character{two / one:>6.1f} times{' !' if is_wrong else ''}"
    )
    return int(is_wrong)


def _seconds(work: Callable[[], object], times: int = 1) -> float:
    """The best of three, in CPU time of this process."""
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        for _ in range(times):
            work()
        best = min(best, (time.process_time() - began) / times)
    return best
