"""The cost of a step, a run and a dead worker in other systems and in this library, on one machine.

    python -m bench peers [--only NAME …] [--rounds N]

Each system has an adapter (`adapters/NAME_peer.py`, whose docstring describes the setup), separate servers,
and a separate virtual environment in `.bench/` (or `BENCH_PEERS_CACHE`) with the versions in
`adapters/NAME.txt`. Each round starts, measures and stops every system, one after the other, so that noise
affects all of them. The figures are medians over the rounds. The output is `results/peers.md`, `peers.json`
and `peers.png`, and with `--readme` also the short table of the README.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Measure, and write the results; 0 when every system that could be measured here was."""
    from bench.peers.measure import main

    return main(arguments)
