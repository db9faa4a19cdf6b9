"""The command `python -m bench [NAME [options]]`. It runs the measurements of this folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
BY_NAME_ONLY = ["peers"]  # it installs other software and takes ten minutes


def main() -> int:
    """Run the named measurement, or all but `peers`. The exit code is 0 if all targets were met."""
    name, options = sys.argv[1] if sys.argv[1:] else "", sys.argv[2:]
    if name and name not in NAMES + BY_NAME_ONLY:
        print(f"python -m bench [{{{','.join(NAMES + BY_NAME_ONLY)}}} [options]]", file=sys.stderr)
        return 2
    return max(_run(each, options) for each in ([name] if name else NAMES))


def _run(name: str, options: list[str]) -> int:
    print(f"=== {name}\n", flush=True)
    code: int = importlib.import_module(f"bench.{name}").main(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
