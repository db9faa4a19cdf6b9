"""Options and steps that several commands share."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import click

from openagents_worker.cli.terminal import Safe, dump, err, out, styled
from openagents_worker.cli.times import moment
from openagents_worker.errors import ConfigError
from openagents_worker.models import RunState
from openagents_worker.store.listing import Page, RunFilters

__all__ = [
    "as_json_option",
    "filter_options",
    "filters_of",
    "labels_of",
    "need",
    "operator",
    "show_page",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

as_json_option = click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
BROUGHT_BY = {"worker": ("greenlet", "httpx", "jsonschema"), "flower": ("flower",)}
"""What a command meets first where an extra of the package is not installed."""

_FILTERS = (
    click.option(
        "--state", "states", multiple=True, type=click.Choice([*map(str, RunState)]), help="May be repeated."
    ),
    click.option(
        "--code", metavar="GLOB", help="Error code with which the run failed or waits. Example: 'llm.*'."
    ),
    click.option(
        "--since",
        metavar="TIME",
        callback=moment,
        help="Accepted since this time: 30m, 1h or 7d ago, or a date and time.",
    ),
    click.option(
        "--until", metavar="TIME", callback=moment, help="Accepted before this time. Format: as --since."
    ),
    click.option("--agent", default=None, help="Id of the agent."),
    click.option("--session", default=None, help="Id of the session."),
    click.option("--tenant", default=None, help="Tenant of the run."),
    click.option(
        "--label", "labels", multiple=True, metavar="NAME=VALUE", help="May be repeated. All must match."
    ),
)


def filter_options(command: F) -> F:
    """The options by which runs are chosen; `filters_of` makes a client's filters of them."""
    for option in reversed(_FILTERS):
        command = option(command)
    return command


def filters_of(given: dict[str, Any]) -> RunFilters:
    """What `filter_options` gave, as `Client.runs` takes it."""
    return {
        "state": given["states"],
        "code": given["code"],
        "since": given["since"],
        "until": given["until"],
        "agent_id": given["agent"],
        "session_id": given["session"],
        "tenant": given["tenant"],
        "labels": labels_of(given["labels"]),
    }


def labels_of(given: tuple[str, ...], option: str = "--label", form: str = "NAME=VALUE") -> dict[str, str]:
    """Names and values out of `NAME=VALUE` arguments."""
    labels = {}
    for text in given:
        name, found, value = text.partition("=")
        if not found:
            raise click.BadParameter(f"{text!r} is not of the form {form}", param_hint=option)
        labels[name] = value
    return labels


def show_page(
    page: Page[T],
    to_json: Callable[[T], Any],
    to_lines: Callable[[Sequence[T]], Sequence[Safe]],
    *,
    as_json: bool,
) -> None:
    """A page of a list; what cannot be read is named, and so is the way to the next page."""
    if as_json:
        listed = {"items": [to_json(item) for item in page], "next_cursor": page.next_cursor}
        problems = [{"key": one.key, "code": one.code} for one in page.problems]
        dump({**listed, "problems": problems} if problems else listed)
        return
    for line in to_lines(page.items) if page.items else ():
        out(line)
    if not page.items:
        err(styled("none", dim=True))
    for one in page.problems:
        err(f"left out: {one.key}: {one.code}")
    if page.next_cursor is not None:
        err(styled(f"more: --cursor {page.next_cursor}", dim=True))


def need(*extras: str) -> None:
    """Raises `ConfigError` where an extra of the package is not installed."""
    missing = [extra for extra in extras if any(find_spec(module) is None for module in BROUGHT_BY[extra])]
    if missing:
        raise ConfigError(
            "this command needs what the base install, which is for producers, leaves out",
            hint=f"pip install 'openagents-worker[{','.join(missing)}]'",
        )


def operator() -> str | None:
    """Who types: the operating system's user, where it has a name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have none
        return None
