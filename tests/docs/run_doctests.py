"""Runs every `>>>` example of the library in this process, and prints what failed as JSON: a text by name."""

from __future__ import annotations

import doctest
import json
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import openagents_worker


def examples() -> Iterator[doctest.DocTest]:
    for module in pkgutil.walk_packages(openagents_worker.__path__, "openagents_worker."):
        spec = find_spec(module.name)
        if spec is None or spec.origin is None or ">>> " not in Path(spec.origin).read_text():
            continue
        found = doctest.DocTestFinder().find(import_module(module.name), module.name)
        yield from (test for test in found if test.examples and test.filename == spec.origin)


def main() -> None:
    failed, tests = {}, list(examples())
    for test in tests:
        said: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
        if said:
            failed[test.name] = "".join(said)
    print(json.dumps({"count": len(tests), "failed": failed}))


if __name__ == "__main__":
    main()
