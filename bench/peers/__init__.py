"""What a step, a run and a dead worker cost in other systems and here, in one run on one machine.

    python -m bench peers [--only NAME …] [--rounds N]

Each system has an adapter (`adapters/NAME_peer.py`, which says what exactly it does), a virtual environment
of its own in `.bench/` (or `BENCH_PEERS_CACHE`) with the versions that stand in `adapters/NAME.txt`, and
servers of its own. In each round every system is started, measured and ended, one after the other, so that
noise meets all alike; the figures are medians over the rounds. Written: `results/peers.md`, `peers.json` and
`peers.png`; with `--readme` also the short table of the README.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Measure, and write the results; 0 when every system that could be measured here was."""
    from bench.peers.measure import main

    return main(arguments)
