"""Command lines of the documentation, parsed by the program that they name. Nothing is executed here."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import celery
import click
from celery.bin.base import CLIContext
from celery.bin.celery import celery as celery_command
from packaging.requirements import Requirement

from openagents_worker.cli.commands import commands as our_command
from openagents_worker.settings import load_settings, unknown_variables
from tests.docs.blocks import ROOT

__all__ = ["PARSED_ONLY", "check_line", "check_variable"]

PARSED_ONLY = {
    "cat": "shows a file of the reader",
    "cp": "copies a file of the reader",
    "curl": "asks a server that the reader has started",
    "docker": "needs a Docker daemon and an image",
    "honcho": "starts the Procfile, which tests/deployment/test_procfile.py does",
    "journalctl": "needs systemd",
    "kill": "needs the process of the reader",
    "kubectl": "needs a cluster",
    "mkdir": "makes a folder of the reader",
    "openssl": "makes the reader's own certificates",
    "redis-cli": "asks the reader's own Redis",
    "redis-server": "starts the reader's own Redis",
    "source": "changes the shell of the reader",
    "sudo": "needs rights that no test has",
    "systemctl": "needs systemd",
    "valkey-server": "starts the reader's own Valkey",
}
"""Programs whose lines are only split into words here, and why."""

OF_THE_TESTS = frozenset({"OPENAGENTS_TEST_PREVIOUS"})
"""Variables with our prefix that tests read, and nothing else."""

BASES = (ROOT, ROOT / "examples" / "django")


def check_line(line: str, folder: Path) -> list[str]:
    """What is wrong with a command line, each as a text. `folder` has the page's own files."""
    problems = []
    here = folder
    for words in _commands(line):
        while words and re.match(r"^[A-Z_][A-Z0-9_]*=", words[0]):
            problems += check_variable(words.pop(0))
        if words[:1] == ["cd"]:
            here = next((base / words[1] for base in (folder, ROOT) if (base / words[1]).is_dir()), here)
            if not here.is_dir() or (here == folder and words[1] != "."):
                problems.append(f"cd {words[1]}: there is no such folder")
        elif words:
            problems += _check_command(words, here)
    return problems


def check_variable(assignment: str) -> list[str]:
    """What is wrong with `NAME=value`: one of ours must exist, and its value must be valid."""
    name, _, value = assignment.partition("=")
    if not name.startswith("OPENAGENTS_") or name in OF_THE_TESTS:
        return []
    if unknown_variables({name: value}):
        return [f"there is no setting {name}"]
    if "$" not in value and "…" not in value:
        load_settings({name: value})
    return []


def _commands(line: str) -> list[list[str]]:
    """The simple commands of a line: what stands between `&&`, `;`, `|` and `&`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    for word in lexer:
        if word and set(word) <= set("&;|"):
            found.append([])
        else:
            found[-1].append(word)
    return [_without_redirection(words) for words in found if words]


def _without_redirection(words: list[str]) -> list[str]:
    cut = next((n for n, word in enumerate(words) if word and set(word) <= set("<>")), len(words))
    return words[:cut]


def _check_command(words: list[str], folder: Path) -> list[str]:
    program = Path(words[0]).name
    check = CHECKS.get(program)
    if check is None:
        if program in PARSED_ONLY:
            return []
        return [f"no test knows the program {program!r}: add it to CHECKS or PARSED_ONLY in {__name__}"]
    try:
        return check(words[1:], folder)
    except click.ClickException as error:
        return [f"{program}: {error.format_message()}"]


# --- parsers ---------------------------------------------------------------------------------------------


def _click(
    command: click.Command,
    name: str,
    arguments: list[str],
    obj: object = None,
    parent: click.Context | None = None,
) -> None:
    context = command.make_context(name, list(arguments), parent=parent, obj=obj)
    if isinstance(command, click.Group):
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        sub_name, sub, sub_arguments = command.resolve_command(context, rest)
        assert sub is not None
        _click(sub, str(sub_name), sub_arguments, parent=context)


def _ours(arguments: list[str], folder: Path) -> list[str]:
    if {"--help", "--version", "-h"} & {*arguments}:
        return []
    _click(our_command, "openagents-worker", arguments)
    return []


def _celery(arguments: list[str], folder: Path) -> list[str]:
    _click(
        celery_command, "celery", arguments, obj=CLIContext(celery.Celery(set_as_current=False), True, None)
    )
    named = [arguments[n + 1] for n, word in enumerate(arguments[:-1]) if word in ("-A", "--app")]
    return [f"celery -A {name}: there is no such module" for name in named if not _exists(name, folder)]


def _exists(name: str, folder: Path) -> bool:
    path = name.partition(":")[0].replace(".", "/")
    top = path.partition("/")[0]
    return any(
        (base / f"{path}.py").is_file() or (base / path).is_dir() or (base / f"{top}.py").is_file()
        for base in (folder, *BASES)
    )


def _make(arguments: list[str], folder: Path) -> list[str]:
    makefile = (ROOT / "Makefile").read_text()
    targets = {*re.findall(r"^([a-z-]+):", makefile, re.MULTILINE), ".venv/.installed"}
    return [
        f"make: there is no target {word}" for word in arguments if "=" not in word and word not in targets
    ]


def _pip(arguments: list[str], folder: Path) -> list[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    problems = []
    words = iter(arguments[1:])
    for word in words:
        if word == "-r":
            path = next(words)
            problems += [] if (ROOT / path).is_file() or (folder / path).is_file() else [f"{path} is missing"]
        elif not word.startswith("-"):
            local = re.fullmatch(r"\.(\[(?P<extras>[^]]*)\])?", word)
            wanted = (
                Requirement(word).extras
                if local is None
                else {*filter(None, (local["extras"] or "").split(","))}
            )
            is_ours = local is not None or Requirement(word).name == "openagents-worker"
            problems += [
                f"there is no extra {extra!r}" for extra in sorted(wanted) if is_ours and extra not in extras
            ]
    return problems


def _python(arguments: list[str], folder: Path) -> list[str]:
    if arguments[:1] == ["-m"]:
        name = arguments[1]
        if name == "openagents_worker.cli":
            return _ours(arguments[2:], folder)
        if name in ("celery", "pip"):
            return CHECKS[name](arguments[2:], folder)
        if name in ("venv", "pytest") or _exists(name, folder) or find_spec(name) is not None:
            return []
        return [f"python -m {name}: there is no such module"]
    if not arguments or arguments[0].startswith("-"):
        return []
    known = any((base / arguments[0]).is_file() for base in (folder, *BASES))
    return [] if known else [f"python {arguments[0]}: there is no such file"]


def _pytest(arguments: list[str], folder: Path) -> list[str]:
    paths = [word.partition("::")[0] for word in arguments if "/" in word or word.endswith(".py")]
    missing = [path for path in paths if not ((ROOT / path).exists() or (folder / path).exists())]
    return [f"pytest {path}: there is no such path" for path in missing]


def _uvicorn(arguments: list[str], folder: Path) -> list[str]:
    return [] if _exists(arguments[0], folder) else [f"uvicorn {arguments[0]}: there is no such module"]


def _export(arguments: list[str], folder: Path) -> list[str]:
    return [problem for word in arguments for problem in check_variable(word)]


CHECKS: dict[str, Callable[[list[str], Path], list[str]]] = {
    "celery": _celery,
    "export": _export,
    "make": _make,
    "openagents-worker": _ours,
    "pip": _pip,
    "pytest": _pytest,
    "python": _python,
    "python3": _python,
    "uvicorn": _uvicorn,
}
