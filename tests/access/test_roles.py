"""Everything that each role does as its own Redis user: manual, commands, Flower.

No right is granted in vain.

All tests are collected by this file, because a file runs in one process: the last tests compare the granted
rights with those that the other tests have used.
"""

from __future__ import annotations

from importlib import import_module

import pytest

from openagents_worker.store.roles import ROLES, RoleName
from openagents_worker.store.scripts import Script
from tests.access.each_command import command, completed  # noqa: F401 - fixtures of its tests
from tests.access.in_flower import flower  # noqa: F401
from tests.access.users import UseOfCommands, acl_words

pytestmark = pytest.mark.long

SENTINEL = "asked of whom a sentinel calls the master"
LEAVES = "a listener leaves while others stay"
OLDER = "kombu before 5.7"
HIDDEN = "Redis does not show it to MONITOR"
FLUSHED = "the scripts are flushed between loading one and running it"
EXCHANGE = "the queue has an exchange that is not direct"
ACKNOWLEDGES = "a message is acknowledged late, or put back at the head"

NEEDED_ELSEWHERE: dict[RoleName, dict[str, str]] = {
    RoleName.WORKER: {
        "role": SENTINEL, "unsubscribe": LEAVES, "punsubscribe": LEAVES, "zrevrangebyscore": OLDER,
        "config": HIDDEN, "command": HIDDEN, "unwatch": ACKNOWLEDGES, "eval": FLUSHED,
    },
    RoleName.PRODUCER: {"role": SENTINEL, "unsubscribe": LEAVES, "eval": FLUSHED, "smembers": EXCHANGE},
    RoleName.OPERATOR: {"role": SENTINEL, "unsubscribe": LEAVES, "eval": FLUSHED, "smembers": EXCHANGE},
    RoleName.WATCHER: {
        "role": SENTINEL, "unsubscribe": LEAVES, "zrank": "a run that waits for its session is shown",
        "hkeys": "the calls of a run that wait for an approval are listed",
    },
    RoleName.FLOWER: {
        "role": SENTINEL, "unsubscribe": LEAVES, "punsubscribe": LEAVES, "zrevrangebyscore": OLDER,
        "unwatch": ACKNOWLEDGES, "hset": ACKNOWLEDGES, "lpush": ACKNOWLEDGES, "exists": "bindings expire",
        "client": "the broker's URL has a client_name",
    },
}  # fmt: skip
"""What these tests do not come by, or not always, and when it is needed."""

for name in ("manual", "each_command", "in_flower"):
    module = import_module(f"tests.access.{name}")
    tests = {test: found for test, found in vars(module).items() if test.startswith("test_")}
    globals().update(tests)


@pytest.fixture
def did_all(request: pytest.FixtureRequest, use: UseOfCommands) -> UseOfCommands:
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    asked_for = {item.originalname for item in functions if item.module is request.module}
    if not asked_for >= {name for name in globals() if name.startswith("test_")}:
        pytest.skip("only some of these tests were asked for")
    return use


@pytest.mark.parametrize("role", RoleName)
def test_every_command_is_used(role: RoleName, did_all: UseOfCommands) -> None:
    granted = {word[1:].partition("|")[0] for word in acl_words(role) if word.startswith("+")}
    in_scripts = {right.command.lower() for name in ROLES[role].scripts for right in Script(name, {}).rights}

    assert granted - did_all.of(role) - in_scripts <= NEEDED_ELSEWHERE[role].keys()


@pytest.mark.parametrize("role", RoleName)
def test_no_dangerous_command_is_granted(role: RoleName) -> None:
    """No command in the category `@dangerous` of Redis, except for those with which a worker reads settings
    of Redis."""
    dangerous = {
        "flushall",
        "flushdb",
        "keys",
        "config|set",
        "debug",
        "shutdown",
        "acl",
        "monitor",
        "script|flush",
    }
    granted = {word[1:] for word in acl_words(role) if word.startswith("+")}
    assert not granted & dangerous
    assert not [word for word in acl_words(role) if word.startswith(("+@", "allkeys", "allchannels"))]
    assert {"~*", "&*", "%R~*"}.isdisjoint(acl_words(role))
