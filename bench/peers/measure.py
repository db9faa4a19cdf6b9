"""Rounds of measurements. The only place that decides their order and writes the results."""

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
TRIES = 2  # after so many failures a system is skipped


def main(arguments: Sequence[str]) -> int:
    """Measure and write the results. Return 0 if no measurement failed."""
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
        prog="python -m bench peers",
        description="The cost of a step, a run and a dead worker in other systems.",
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--nothing", type=int, default=300, help="number of runs of one empty step, per measurement"
    )
    parser.add_argument(
        "--minutes", type=float, default=11.0, help="start no round that would exceed this time"
    )
    parser.add_argument("--no-recovery", action="store_true")
    parser.add_argument(
        "--redraw", action="store_true", help="create table and picture again, from peers.json"
    )
    parser.add_argument("--readme", action="store_true", help="write the short table to README.md")
    parser.add_argument("--no-picture", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


class Bench:
    """Rounds of measurements and their results."""

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
                self._log(f"{number} rounds of {self._options.rounds}: no time for another one")
                return number
            shift = number % len(self._systems)  # so that no system is always the first
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
        self._log(f"round {number + 1}: {system.name}")
        with self._recording_failures(system), Adapter(system) as adapter:
            found = self._found[system.name]
            found["facts"] = adapter.ask("start", START_S)
            measured: dict[str, Any] = {"jobs": []}
            for steps, size in JOBS:
                runs = range(system.job_runs)
                measured["jobs"].append([adapter.ask("job", JOB_S, steps=steps, size=size) for _ in runs])
            found["rounds"].append(measured)  # kept even if a later measurement fails
            measured["nothing"] = adapter.ask("nothing", NOTHING_S, runs=self._options.nothing)
            if system.recovery == "in turn" and not self._options.no_recovery:
                found["recoveries"].append(adapter.ask("recovery", RECOVERY_S))

    # --- recoveries that take minutes ---

    def _begin_recovery(self, beside: contextlib.ExitStack, system: System) -> Adapter | None:
        """Start the measurement in a separate instance. Its result is collected after all rounds."""
        self._log(f"in parallel to the rounds: the recovery of {system.name}")
        with self._recording_failures(system):
            adapter = beside.enter_context(Adapter(system))
            adapter.ask("start", START_S)
            adapter.send("recovery")
            return adapter
        return None  # `_recording_failures` has recorded the error

    def _collect_recovery(self, system: System, adapter: Adapter | None) -> None:
        if adapter is not None:
            self._log(f"waiting for the recovery of {system.name}")
            with self._recording_failures(system):
                self._found[system.name]["recoveries"].append(adapter.answer(SLOW_RECOVERY_S))

    # --- failures ---

    @contextlib.contextmanager
    def _recording_failures(self, system: System) -> Iterator[None]:
        try:
            yield
        except NotMeasured as why:
            self._found[system.name]["not_measured"] = str(why)
            self._log(f"{system.name}: not measured: {why}")
        except Exception as why:  # any error: the other systems are still measured
            words = str(why) if isinstance(why, Failed) else f"{type(why).__name__}: {why}"
            self._found[system.name]["failures"].append(words)
            self._log(f"{system.name}: {words}")

    def _log(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)


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
    """The median time of a sync of 4 KB to the disk that all systems use, in ms."""
    took = []
    with tempfile.NamedTemporaryFile(dir=cache()) as file:
        for _ in range(SYNCS):
            began = time.perf_counter()
            file.write(os.urandom(4096))
            file.flush()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took) * 1000
