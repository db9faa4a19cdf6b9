"""Options and functions that several commands share."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import click

from openagents_worker.cli.completion import agent_ids, run_ids, session_ids
from openagents_worker.cli.terminal import Safe, dump, err, out, styled
from openagents_worker.cli.times import parse_time_option
from openagents_worker.errors import ConfigError
from openagents_worker.models import RunState
from openagents_worker.store.listing import Page, RunFilters

__all__ = [
    "as_json_option",
    "filter_options",
    "to_run_filters",
    "parse_pairs",
    "require_extras",
    "current_user",
    "show_page",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

as_json_option = click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
MODULES_OF_EXTRA = {"worker": ("greenlet", "httpx", "jsonschema"), "flower": ("flower",)}
"""Modules that are missing if an extra of the package is not installed."""

_FILTERS = (
    click.option(
        "--code", metavar="GLOB", help="Error code with which the run failed or waits. Example: 'llm.*'."
    ),
    click.option(
        "--since",
        metavar="TIME",
        callback=parse_time_option,
        help="Accepted since this time: 30m, 1h or 7d ago, or a date and time.",
    ),
    click.option(
        "--until",
        metavar="TIME",
        callback=parse_time_option,
        help="Accepted before this time. Format: as --since.",
    ),
    click.option("--agent", default=None, shell_complete=agent_ids, help="Id of the agent."),
    click.option("--session", default=None, shell_complete=session_ids, help="Id of the session."),
    click.option(
        "--parent",
        default=None,
        metavar="RUN",
        shell_complete=run_ids,
        help="Id of the run that has delegated to it.",
    ),
    click.option("--tenant", default=None, help="Tenant of the run."),
    click.option(
        "--label", "labels", multiple=True, metavar="NAME=VALUE", help="May be repeated. All must match."
    ),
)


def filter_options(states: Iterable[RunState] = RunState) -> Callable[[F], F]:
    """Add the options that select runs in these states. `to_run_filters` converts their values."""
    choice = click.Choice([*map(str, states)])
    by_state = click.option("--state", "states", multiple=True, type=choice, help="May be repeated.")

    def decorate(command: F) -> F:
        for option in reversed((by_state, *_FILTERS)):
            command = option(command)
        return command

    return decorate


def to_run_filters(options: dict[str, Any]) -> RunFilters:
    """Convert the values of `filter_options` to the filters of `Client.runs`."""
    return {
        "state": options["states"] or None,
        "code": options["code"],
        "since": options["since"],
        "until": options["until"],
        "agent_id": options["agent"],
        "session_id": options["session"],
        "parent_run_id": options["parent"],
        "tenant": options["tenant"],
        "labels": parse_pairs(options["labels"]),
    }


def parse_pairs(
    arguments: tuple[str, ...], option: str = "--label", form: str = "NAME=VALUE"
) -> dict[str, str]:
    """Parse `NAME=VALUE` arguments of this option. Raises `click.BadParameter`, also for a name with two
    values."""
    pairs: dict[str, str] = {}
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not separator:
            raise click.BadParameter(f"{argument!r} is not of the form {form}", param_hint=option)
        if pairs.setdefault(name, value) != value:
            message = f"{name!r} has two values: {pairs[name]!r} and {value!r}"
            raise click.BadParameter(message, param_hint=option)
    return pairs


def show_page(
    page: Page[T],
    to_json: Callable[[T], Any],
    to_lines: Callable[[Sequence[T]], Sequence[Safe]],
    *,
    as_json: bool,
) -> None:
    """Print a page of a list, then the items that cannot be read and the cursor of the next page."""
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


def require_extras(*extras: str) -> None:
    """Raise `ConfigError` if one of these extras of the package is not installed."""
    missing = [
        extra for extra in extras if any(find_spec(module) is None for module in MODULES_OF_EXTRA[extra])
    ]
    if missing:
        raise ConfigError(
            "this command needs packages that the base installation (for producers) does not contain",
            hint=f"pip install 'openagents-worker[{','.join(missing)}]'",
        )


def current_user() -> str | None:
    """The name of the operating system's user, or None if it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        return None
