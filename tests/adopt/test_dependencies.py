"""Dependencies: each extra declares all packages that its part of the library imports.

An installation that only works beside a test runner is the first thing a newcomer meets. Here it is found
without installing anything; `tests/extras` installs every extra into an empty environment.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

import openagents_worker
from tests.adopt.declared import (
    BASE,
    EXTRA_OF,
    OF_THE_HOST,
    OPTIONAL,
    PACKAGE,
    ROOT,
    closure,
    declared,
    extra_of,
    foreign_imports,
    modules,
    run_in,
    view,
)

BY_OTHERS = {
    "packaging": "kombu's transport for Redis imports it, and only kombu's extra `redis` declares it",
    "hiredis": "redis-py parses with it where it is installed",
    "sniffio": "httpcore asks it in every request where it is installed",
    "opentelemetry-sdk": "collects what the API gets: the same package name as the API",
    "opentelemetry-exporter-otlp-proto-http": "sends it: the same package name as the API",
    "flower": "a program, which Celery's command line finds by its entry point",
}
"""Packages that are declared, but imported by no module, with the reason."""

OPTIONAL_PRODUCTS = {"django", "socksio"}
"""Packages that a module uses only in the process of an application that has them."""


def test_every_part_belongs_to_an_extra() -> None:
    """A new module is assigned in `declared.py`, and every assigned module exists."""
    assert [name for name in modules() if not _is_assigned(name)] == []
    assert [
        name for name in (*EXTRA_OF, *(of for of, _ in OPTIONAL), *OF_THE_HOST) if name not in modules()
    ] == []


def _is_assigned(module: str) -> bool:
    try:
        extra_of(module)
    except LookupError:
        return False
    return True


def test_every_import_is_declared_for_the_extra_of_its_part() -> None:
    """Also an import in a function, and a package that is only a dependency of another one, which may drop
    it."""
    undeclared = []
    for one in foreign_imports():
        names = {canonicalize_name(requirement.name) for requirement in declared(one.extra)}
        if one.distribution not in {*names, *OPTIONAL_PRODUCTS, OF_THE_HOST.get(one.module)}:
            undeclared.append(
                f"{PACKAGE}.{one.module}, line {one.line}: {one.name} is not declared in {one.extra!r}"
            )

    assert undeclared == []


@pytest.mark.parametrize(
    "extra",
    [
        BASE,
        "worker",
        "embedded",
        "flower",
        "uvloop",
        "otel",
        "metrics",
        "http2",
        "litellm",
        "mcp",
        "tokenizers",
        "zep",
    ],
)
def test_everything_that_is_declared_is_used(extra: str) -> None:
    """Every dependency is one more that a product must be able to install."""
    ours = set(map(str, declared(extra))) - (set(map(str, declared(BASE))) if extra else set())
    imported = {one.distribution for one in foreign_imports()}
    names = {canonicalize_name(one.name) for one in declared(extra) if str(one) in ours}

    assert names - imported - set(BY_OTHERS) == set()


def test_no_extra_of_a_user_is_unknown_here() -> None:
    """Those for developers of this library aside."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    assert set(extras) - {"dev", "ui"} == {
        "worker",
        "embedded",
        "flower",
        "uvloop",
        "otel",
        "metrics",
        "http2",
        "langfuse",
        "litellm",
        "mcp",
        "phoenix",
        "rich",
        "tokenizers",
        "zep",
    }


@pytest.mark.long
@pytest.mark.parametrize(
    "extras", [(), ("worker",), ("flower",), ("otel",)], ids=["base", "worker", "flower", "otel"]
)
def test_every_module_can_be_imported_with_what_its_extra_brings(
    extras: tuple[str, ...], tmp_path: Path
) -> None:
    """With the package, its dependencies and nothing else. This also finds undeclared imports of other
    packages."""
    promised = [name for name in modules() if extra_of(name) in (BASE, *extras) and name not in OF_THE_HOST]
    promised = [f"{PACKAGE}.{name}" for name in promised if not name.endswith("__main__")]
    program = IMPORT_ALL.format(names=promised)

    done = run_in(view(tmp_path / "view", *extras), program)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


IMPORT_ALL = """
import importlib
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{{name}}: {{error}}")
"""


def test_the_front_door_opens_with_the_base_install(tmp_path: Path) -> None:
    """Every name of `openagents_worker` can be had by a producer."""
    done = run_in(
        view(tmp_path / "view"),
        f"from {PACKAGE} import *; print(*sorted(set(globals()) & set({openagents_worker.__all__!r})))",
    )

    assert (done.stdout.split(), done.stderr) == (openagents_worker.__all__, "")


@pytest.mark.long
@pytest.mark.parametrize(
    ("extras", "programs"),
    [
        ((), ["openagents_worker.cli.main()"]),
        (("worker",), ["openagents_worker.cli.main()", "celery.bin.celery.main()"]),
        (("worker", "flower"), ["celery.bin.celery.main()"]),
    ],
    ids=["base", "worker", "worker,flower"],
)
def test_programs_start_with_what_their_extra_brings(
    extras: tuple[str, ...], programs: list[str], tmp_path: Path
) -> None:
    """Our command line, and Celery's with an app of this library, which loads the broker transport."""
    folder = view(tmp_path / "view", *extras)
    (folder / "project.py").write_text(PROJECT)
    for program in programs:
        module = program.rpartition(".")[0]
        arguments = ["-A", "project", *extras[-1:]] if module.startswith("celery") else []
        done = run_in(folder, f"import {module}; sys.argv = ['program', *{arguments!r}, '--help']; {program}")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert "Usage:" in done.stdout


PROJECT = """
from openagents_worker.settings import load_settings
from openagents_worker.celery.app import make_worker_app
app = make_worker_app(load_settings())
app.connection_for_write().transport
"""


def test_a_view_shows_what_is_declared_and_nothing_else(tmp_path: Path) -> None:
    """What these tests rest on: pytest is in this environment, and not in a view of it."""
    folder = view(tmp_path / "view")

    assert run_in(folder, "import celery, redis, pydantic_core").returncode == 0
    assert "No module named 'pytest'" in run_in(folder, "import pytest").stderr
    assert "greenlet" in closure("worker") - closure()
