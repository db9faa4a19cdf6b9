"""`python -m chaos`: run a deployment under load and faults, audit it, write a report.

The exit code is 0 if every fault was injected and nothing was lost, repeated, reordered or left behind,
otherwise 1. Each seed is a run of its own; the report has one entry per run. With `--merge`, nothing is run:
the entries of several reports of one commit become one report, and the exit code also says whether it
contains everything that a published report must contain.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chaos.diagnosis import diagnosis
from chaos.report import merged, missing, total, write
from chaos.run import Options, chaos_run

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit code."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[defaults.seed])
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="of each seed")
    parser.add_argument("--workers", type=int, default=defaults.workers)
    parser.add_argument("--lease-s", type=float, default=defaults.lease_s)
    parser.add_argument("--runs-per-second", type=float, default=defaults.runs_per_second)
    parser.add_argument("--faults-per-minute", type=float, default=defaults.faults_per_minute)
    parser.add_argument("--appendfsync", choices=("everysec", "always"), default=defaults.appendfsync)
    parser.add_argument("--sentinel", action="store_true", help="a master and a replica that fail over")
    parser.add_argument("--report", type=Path, default=HERE / "report.json")
    parser.add_argument("--add", action="store_true", help="keep the entries that the report has")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="REPORT", help="merge these reports")
    given = vars(parser.parse_args(arguments))
    path: Path = given.pop("report")
    if reports := given.pop("merge"):
        return _merge(reports, path)
    entries = json.loads(path.read_text())["runs"] if given.pop("add") and path.exists() else []
    clean = True
    for seed in given.pop("seed"):
        entry = _run(Options(seed=seed, **given), path.with_suffix(f".{seed}.log"))
        entries.append(entry)
        clean = clean and not entry["faults"]["not injected"] and not any(entry["violations"].values())
        write(path, entries)
        print(json.dumps({name: entry[name] for name in ("faults", "runs", "violations")}, indent=2))
    print(f"{'clean' if clean else 'VIOLATIONS'}; the report is {path}")
    return 0 if clean else 1


def _merge(reports: Sequence[Path], path: Path) -> int:
    try:
        entries = merged(reports)
    except ValueError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 1
    write(path, entries)
    found = total(entries)
    lacks = missing(entries)
    print(json.dumps(found, indent=2))
    print("\n".join([f"the report is {path}", *(f"missing: {text}" for text in lacks)]))
    return 1 if lacks or any(found["violations"].values()) else 0


def _run(options: Options, log: Path) -> dict[str, Any]:
    head = {
        "commit": commit_of(HERE),
        "began_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, redis-py {version('redis')}",
    }
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, chaos_run(options, Path(folder)) as run:
        run.inject()
        found, endings = run.audit()
        if not found.clean():
            log.write_text(diagnosis(run.deployment, run.evidence(), found))
        return head | run.report(found, endings)


def commit_of(folder: Path) -> str:
    """The commit of the tree of this folder, with `-dirty` if other files than its report have changes."""
    changes = _git(
        folder, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)report.json"
    )
    return _git(folder, "describe", "--always") + ("-dirty" if changes else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603


if __name__ == "__main__":
    sys.exit(main())
