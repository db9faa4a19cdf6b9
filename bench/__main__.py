"""`python -m bench NAME …`: the one door to the measurements of this folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def main() -> int:
    """Run the measurement that the command line names; its exit code says whether its target was met."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"python -m bench {{{','.join(NAMES)}}} [options]", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])
    return code


if __name__ == "__main__":
    sys.exit(main())
