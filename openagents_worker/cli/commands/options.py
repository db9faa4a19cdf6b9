"""Options and steps that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from openagents_worker.cli.display import dump
from openagents_worker.errors import ConfigError
from openagents_worker.store.listing import Page

__all__ = ["as_json_option", "import_from_here", "labels_of", "need", "show_page"]

T = TypeVar("T")

as_json_option = click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
BROUGHT_BY = {"worker": ("greenlet", "httpx", "jsonschema"), "flower": ("flower",)}
"""What a command meets first where an extra of the package is not installed."""


def labels_of(given: tuple[str, ...]) -> dict[str, str]:
    labels = {}
    for text in given:
        name, found, value = text.partition("=")
        if not found:
            raise click.BadParameter(f"{text!r} is no NAME=VALUE", param_hint="--label")
        labels[name] = value
    return labels


def show_page(
    page: Page[T], to_json: Callable[[T], Any], to_line: Callable[[T], str], *, as_json: bool
) -> None:
    if as_json:
        dump({"items": [to_json(item) for item in page], "next_cursor": page.next_cursor})
        return
    for item in page:
        click.echo(to_line(item))
    if page.next_cursor is not None:
        click.echo(click.style(f"more: --cursor {page.next_cursor}", dim=True), err=True)


def import_from_here() -> None:
    """Let modules of the current directory be imported, as the `celery` command does.

    For commands that import somebody's code. An installed command, unlike `python -m`, does not look there.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


def need(*extras: str) -> None:
    missing = [extra for extra in extras if any(find_spec(module) is None for module in BROUGHT_BY[extra])]
    if missing:
        raise ConfigError(
            "this command needs what the base install, which is for producers, leaves out",
            hint=f"pip install 'openagents-worker[{','.join(missing)}]'",
        )
