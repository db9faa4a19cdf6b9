"""The tests of the manual with minimal rights: everything that it shows works for users without other
rights."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import tests.fundamentals

for path in sorted(Path(tests.fundamentals.__file__).parent.glob("test_*.py")):
    module = import_module(f"tests.fundamentals.{path.stem}")
    number = path.stem.split("_")[1]
    globals().update(
        {f"{name}__{number}": found for name, found in vars(module).items() if name.startswith("test_")}
    )
