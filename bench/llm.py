"""The CPU time of a model call in the client: this library, bare httpx, and the providers' own packages.

All parse the same replies to text, from a server that sends prepared bytes: a whole reply of 300 words, and a
stream of 200 pieces that arrive one by one. Every client is a process of its own; they are measured in
alternating rounds. The packages are installed into an environment of the benchmark, below `.bench`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench._client_process import ClientProcess, client_process
from bench._raw_model import PIECES, WORDS_OF_A_WHOLE, raw_model
from bench.peers.environments import python_of

MAX_OF_HTTPX, MAX_OF_PACKAGE = 1.3, 1.0
PAUSE_MS = 3
CALLS = {"whole": (40, 5), "streamed": (1, 20)}  # rounds of calls, calls at the same time
PACKAGES = {"chat": "openai", "responses": "openai", "messages": "anthropic"}


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table. Return 0 if all ratios are within the limits."""
    parser = argparse.ArgumentParser(prog="python -m bench llm", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without-packages", action="store_true", help="compare with bare httpx only")
    parser.add_argument("--only", choices=PACKAGES, help="measure one wire format")
    options = parser.parse_args(arguments)
    packages = None if options.without_packages else _python_with_packages()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"load at the start: {os.getloadavg()[0]:.1f}")
    print(_versions(Path(sys.executable), "httpx"))
    if packages is not None:
        print(_versions(packages, "openai", "anthropic"))
    names = {"ours": sys.executable, "httpx": sys.executable}
    if packages is not None:
        names |= dict.fromkeys(sorted(set(PACKAGES.values())), str(packages))
    with raw_model(PAUSE_MS) as url, ExitStack() as stack:
        clients = {
            name: stack.enter_context(client_process(python, name, f"{url}/text/v1"))
            for name, python in names.items()
        }
        forms = [options.only] if options.only else list(PACKAGES)
        _print_head(options.rounds)
        rows = [(form, way) for form in forms for way in CALLS]
        met = [_print_row(form, way, _measured(clients, form, way, options.rounds)) for form, way in rows]
    return 0 if all(met) and (packages is not None or options.without_packages) else 1


def _python_with_packages() -> Path | None:
    """The interpreter of the environment with the providers' packages; None if it cannot be made."""
    try:
        return python_of("vendors")
    except (OSError, RuntimeError) as error:
        print(f"The packages openai and anthropic cannot be installed, so they are not measured: {error}")
        return None


def _versions(python: Path, *packages: str) -> str:
    code = (
        "import sys, importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
    )
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _measured(clients: dict[str, ClientProcess], form: str, way: str, rounds: int) -> dict[str, list[float]]:
    """The CPU time of a call in microseconds, by client, in the order of the rounds."""
    names = [name for name in clients if name in ("ours", "httpx", PACKAGES[form])]
    costs: dict[str, list[float]] = {name: [] for name in names}
    texts = set()
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cost, text = clients[name].measure(form, way, *CALLS[way])
            texts.add(text)
            if number:  # the first round warms up
                costs[name].append(cost)
    if len(texts) != 1:
        raise RuntimeError(f"{form}, {way}: the clients read different texts: {sorted(texts)}")
    return costs


def _print_head(rounds: int) -> None:
    what = f"a whole reply of {WORDS_OF_A_WHOLE} words, a stream of {PIECES} pieces"
    print(f"\nCPU of a call in the client, in µs: {what}; median of {rounds} alternating rounds\n")
    print("| | ours | bare httpx | ours / httpx | limit | package | ours / package | limit |")
    print("|---|---|---|---|---|---|---|---|", flush=True)


def _print_row(form: str, way: str, costs: dict[str, list[float]]) -> bool:
    """Print a row of the table. Returns whether its ratios are within the limits."""
    ours, bare, package = costs["ours"], costs["httpx"], PACKAGES[form]
    ratio = _ratio(ours, bare)
    met = ratio <= MAX_OF_HTTPX
    line = f"| {form}, {way} | {_median(ours)} | {_median(bare)} | {ratio:.2f} | {MAX_OF_HTTPX} |"
    if package in costs:
        of_package = _ratio(ours, costs[package])
        met = met and of_package < MAX_OF_PACKAGE
        line += f" {package}: {_median(costs[package])} | {of_package:.2f} | below {MAX_OF_PACKAGE:.0f} |"
    else:
        line += f" {package}: not measured | | below {MAX_OF_PACKAGE:.0f} |"
    print(line, flush=True)
    return met


def _median(costs: Sequence[float]) -> str:
    return f"{statistics.median(costs):,.0f}"


def _ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))
