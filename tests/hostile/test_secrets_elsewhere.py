"""Secrets and control sequences through all entry points: no output contains them.

The outputs are texts of errors, events of runs, output of commands, pages, and the worker's log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Any

import pytest

from openagents_worker.printable import printable
from tests.hostile.entry_points import cli
from tests.hostile.matrix import SECRETS as KIND
from tests.hostile.planted import CONTROL, SECRETS
from tests.hostile.table import Attack, Case, cases, hostile
from tests.hostile.world import World

PLANTED = SECRETS[:-1]  # the last one is known to the workers of another world
NEEDLES = {form for secret in PLANTED for form in (secret.needle, json.dumps(secret.needle)[1:-1])}
ANY_NEEDLE = re.compile("|".join(map(re.escape, sorted(NEEDLES))))
SOME = PLANTED[::2]

REFUSED = ("request.invalid", "user.agent_not_found", "request.too_large")
# An id identifies a run. It is not a secret, and is shown unchanged.
PLACES = ("budget", "labels", "output_type", "on_busy", "unknown")
OPTIONS = ("countdown", "eta", "expires", "priority", "link", "headers")


def placed(place: str, text: str) -> dict[str, Any]:
    match place:
        case "unknown":
            return {text: text}
        case "labels":
            return {"labels": {text: [text]}}
        case "output_type":
            return {"output_type": {"type": text, "$ref": text}}
        case "budget":
            return {"budget": {"max_steps": text, text: text}}
        case _:
            return {place: text}


def of_message(place: str, text: str) -> Any:
    def changed(envelope: dict[str, Any]) -> dict[str, Any]:
        [request], *more = json.loads(envelope["body"])
        return {**envelope, "body": json.dumps([[{**request, **placed(place, text)}], *more])}

    return changed


def of_record(text: str) -> Any:
    return lambda redis, keys, run_id: redis.hset(keys("run", run_id), "request", text)


def address(number: int, text: str, needle: str) -> str:
    """A URL that contains the secret at one of the usual places."""
    word = re.sub(r"[^A-Za-z0-9._~-]", "", needle)
    forms = (
        f"http://ann:{word}@127.0.0.1/",
        f"http://127.0.0.1/?api_key={word}",
        f"http://127.0.0.1/x?a=1&token={word}&b=2",
        f"http://ann:{word}@127.0.0.1:99999/",
        f"http://127.0.0.1/?password={word}#x",
        f"http://127.0.0.1/?X-Amz-Signature={word}",
    )
    return forms[number % len(forms)]


def of_urls() -> dict[str, tuple[Any, Any]]:
    return {
        f"{secret.name}, {number % 6}": (
            address(number, secret.text, secret.needle),
            ("tool.permanent", "tool.validation"),
        )
        for number, secret in enumerate(PLANTED)
    }


def _cases() -> list[Case]:
    found = [*cases("url", of_urls())]
    for number, secret in enumerate(PLANTED):
        place, option = PLACES[number % len(PLACES)], OPTIONS[number % len(OPTIONS)]
        whole = f"{secret.text}"
        found += cases(
            "event", {secret.name: (repr({"note": whole, "password": secret.needle}), "completed")}
        )
        if number % 2:
            found += cases("request", {f"{place}: {secret.name}": (placed(place, whole), REFUSED)})
            found += cases("options", {f"{option}: {secret.name}": ({option: whole}, REFUSED)})
            found += cases("message", {f"{place}: {secret.name}": (of_message(place, whole), REFUSED)})
            found += cases("record", {secret.name: (of_record(whole), "record.unreadable")})
            found += cases("tool_error", {secret.name: (f"KeyError({whole!r})", "tool.error")})
    for name, text in CONTROL.items():
        found += cases("tool_result", {name: (repr(text), "completed")})
        found += cases("state", {name: (repr({text: text}), "completed")})
        found += cases("event", {name: (repr({"text": text, text: 1}), "completed")})
        found += cases("last_event_id", {name: (text, "request.invalid")})
        found += cases("page", {name: (f"/task/{text}", ("200", "400", "403", "404", "closed"))})
    return found


OF_RUNS = ("tool_result", "state", "event")


@pytest.fixture(scope="module")
def lines(world: World) -> Generator[list[str]]:
    """The worker's log lines during these tests. They are checked once more after the last test."""
    begin = len(world.log)
    yield world.log
    world.went_on()
    assert [line for line in world.log[begin:] if ANY_NEEDLE.search(line) or printable(line) != line] == []


@hostile(KIND, _cases())
def test_nothing_of_it_is_shown(case: Case, attack: Attack, world: World, lines: list[str]) -> None:
    attack(case)

    if case.entry_point in OF_RUNS and case.name in CONTROL:
        for command in ("show", "watch"):
            assert cli(world, [command, world.last_run]) == "exit 0"
    leaked = [text[:2_000] for text in world.shown if ANY_NEEDLE.search(text)]
    assert leaked == []
    assert [text for text in world.printed if printable(text) != text] == []
