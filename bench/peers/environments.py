"""Virtual environments of the peers. The only place that installs anything."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["ADAPTERS", "ROOT", "cache", "python_of"]

ROOT = Path(__file__).resolve().parent.parent.parent
ADAPTERS = Path(__file__).resolve().parent / "adapters"
STAMP = ".installed"


def cache() -> Path:
    """The folder for the environments and the data of the systems: `BENCH_PEERS_CACHE` or `.bench`."""
    folder = Path(os.environ.get("BENCH_PEERS_CACHE") or ROOT / ".bench")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def python_of(name: str) -> Path:
    """The interpreter of the environment with the packages of `adapters/NAME.txt` and `NAME.npm`.

    The environment is created if it does not exist or the lists have changed. Raises `RuntimeError` with the
    output of the installer.
    """
    lists = [file for kind in ("txt", "npm") if (file := ADAPTERS / f"{name}.{kind}").exists()]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in lists) + sys.version.encode()).hexdigest()
    home = cache() / "environments" / name
    stamp = home / STAMP
    if not stamp.exists() or stamp.read_text() != digest:
        print(f"  installing {name} into {home}", file=sys.stderr, flush=True)
        shutil.rmtree(home, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(home)])
        for file in lists:
            _install(home, file)
        stamp.write_text(digest)
    return home / "bin" / "python"


def _install(home: Path, file: Path) -> None:
    if file.suffix == ".txt":
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "--requirement", str(file)])
        return
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"npm was not found; it installs the packages of {file.name}")
    packages = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    _run([npm, "install", "--prefix", str(home / "npm"), *quiet, *packages])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:4])} …: {(done.stderr or done.stdout).strip()[-400:]}")
