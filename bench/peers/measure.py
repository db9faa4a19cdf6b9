"""Rounds over the systems. The only place that decides what is measured when, and that writes the results."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers.drive import Adapter, Failed, NotMeasured, adopt_orphans
from bench.peers.environments import ROOT, cache
from bench.peers.report import draw, write_readme, write_table
from bench.peers.systems import JOBS, SYSTEMS, System

RESULTS = ROOT / "bench" / "results"
START_S, JOB_S, NOTHING_S, RECOVERY_S, SLOW_RECOVERY_S = 90.0, 60.0, 90.0, 120.0, 460.0
SYNCS = 50
TRIES = 2  # a system that has failed so often is left alone


def main(arguments: Sequence[str]) -> int:
    """Measure, and write the results; 0 when every system that could be measured here was."""
    options = _options(arguments)
    if options.redraw:
        results = json.loads((options.results / "peers.json").read_text())
    else:
        adopt_orphans()
        results = Bench(options).measure()
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "peers.json").write_text(json.dumps(results, indent=1) + "\n")
    print(write_table(results, options.results))
    if options.readme:
        write_readme(results, ROOT / "README.md")
    failed = any(system["failures"] for system in results["systems"].values())
    if not options.no_picture:
        try:
            draw(results, options.results)
        except RuntimeError as why:
            print(why, file=sys.stderr)
            failed = True
    return int(failed)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    names = [system.name for system in SYSTEMS]
    parser = argparse.ArgumentParser(
        prog="python -m bench peers", description="What a step, a run and a dead worker cost elsewhere."
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nothing", type=int, default=300, help="runs that do nothing, a measurement")
    parser.add_argument("--minutes", type=float, default=11.0, help="no round begins that would take longer")
    parser.add_argument("--no-recovery", action="store_true")
    parser.add_argument("--redraw", action="store_true", help="table and picture again, from peers.json")
    parser.add_argument("--readme", action="store_true", help="put the short table into README.md")
    parser.add_argument("--no-picture", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


class Bench:
    """Rounds of measurements, and what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._systems = [system for system in SYSTEMS if system.name in options.only]
        self._found: dict[str, dict[str, Any]] = {
            system.name: {
                "title": system.title,
                "facts": None,
                "rounds": [],
                "recoveries": [],
                "failures": [],
            }
            for system in self._systems
        }

    def measure(self) -> dict[str, Any]:
        began = time.monotonic()
        slow = [each for each in self._systems if each.recovery == "beside" and not self._options.no_recovery]
        with contextlib.ExitStack() as beside:
            waited_for = [(each, self._begin_recovery(beside, each)) for each in slow]
            rounds = self._rounds(began)
            for system, adapter in waited_for:
                self._collect_recovery(system, adapter)
        return {
            "machine": _machine(),
            "rounds": rounds,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "systems": self._found,
        }

    # --- rounds ---

    def _rounds(self, began: float) -> int:
        longest_s = 0.0
        for number in range(self._options.rounds):
            round_began = time.monotonic()
            if round_began - began + longest_s > self._options.minutes * 60:
                self._say(f"{number} rounds of {self._options.rounds}: no time for another")
                return number
            shift = number % len(self._systems)  # nobody is always first
            for system in self._systems[shift:] + self._systems[:shift]:
                if self._is_due(system):
                    self._measure_once(system, number)
            longest_s = max(longest_s, time.monotonic() - round_began)
        return int(self._options.rounds)

    def _is_due(self, system: System) -> bool:
        found = self._found[system.name]
        enough = system.rounds is not None and len(found["rounds"]) >= system.rounds
        return not enough and len(found["failures"]) < TRIES and "not_measured" not in found

    def _measure_once(self, system: System, number: int) -> None:
        self._say(f"round {number + 1}: {system.name}")
        with self._noting(system), Adapter(system) as adapter:
            found = self._found[system.name]
            found["facts"] = adapter.ask("start", START_S)
            measured: dict[str, Any] = {"jobs": []}
            for steps, size in JOBS:
                runs = range(system.job_runs)
                measured["jobs"].append([adapter.ask("job", JOB_S, steps=steps, size=size) for _ in runs])
            found["rounds"].append(measured)  # these stand, whatever becomes of the rest
            measured["nothing"] = adapter.ask("nothing", NOTHING_S, runs=self._options.nothing)
            if system.recovery == "in turn" and not self._options.no_recovery:
                found["recoveries"].append(adapter.ask("recovery", RECOVERY_S))

    # --- recoveries that take minutes ---

    def _begin_recovery(self, beside: contextlib.ExitStack, system: System) -> Adapter | None:
        """Kill a worker of an instance of its own; what comes of it is asked for after all rounds."""
        self._say(f"beside the rounds: the recovery of {system.name}")
        with self._noting(system):
            adapter = beside.enter_context(Adapter(system))
            adapter.ask("start", START_S)
            adapter.tell("recovery")
            return adapter
        return None  # noted

    def _collect_recovery(self, system: System, adapter: Adapter | None) -> None:
        if adapter is not None:
            self._say(f"waiting for the recovery of {system.name}")
            with self._noting(system):
                self._found[system.name]["recoveries"].append(adapter.answer(SLOW_RECOVERY_S))

    # --- what goes wrong stays with the one system ---

    @contextlib.contextmanager
    def _noting(self, system: System) -> Iterator[None]:
        try:
            yield
        except NotMeasured as why:
            self._found[system.name]["not_measured"] = str(why)
            self._say(f"{system.name}: not measured: {why}")
        except Exception as why:  # whatever it is, the others are still to be measured
            words = str(why) if isinstance(why, Failed) else f"{type(why).__name__}: {why}"
            self._found[system.name]["failures"].append(words)
            self._say(f"{system.name}: {words}")

    def _say(self, words: str) -> None:
        print(f"  {words}", file=sys.stderr, flush=True)


# --- the machine -----------------------------------------------------------------------------------------


def _machine() -> Mapping[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{_processor()}, {os.cpu_count()} cores, {platform.machine()}",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load": round(os.getloadavg()[0], 1),
        "sync_ms": round(_sync_ms(), 2),
    }


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or "unknown processor"


def _sync_ms() -> float:
    """What it takes to get 4 KB to the disk that all systems write to."""
    took = []
    with tempfile.NamedTemporaryFile(dir=cache()) as file:
        for _ in range(SYNCS):
            began = time.perf_counter()
            file.write(os.urandom(4096))
            file.flush()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took) * 1000
