"""No file grants a command that nobody uses: what the other tests of this package did is compared with it.

Where they ran in another process, or not all of them, there is nothing to compare.
"""

from __future__ import annotations

import pytest

from openagents_worker.store.roles import ROLES, RoleName
from openagents_worker.store.scripts import Script
from tests.access.users import UseOfCommands, acl_words

SENTINEL = "asked of whom a sentinel calls the master"
LEAVES = "a listener leaves while others stay"
OLDER = "kombu before 5.7"
HIDDEN = "Redis does not show it to MONITOR"
FIRST = "an asyncio producer is the first who runs a script"
EXCHANGE = "the queue has an exchange that is not direct"
ACKNOWLEDGES = "a message is acknowledged late, or put back at the head"

NEEDED_ELSEWHERE: dict[RoleName, dict[str, str]] = {
    RoleName.WORKER: {
        "role": SENTINEL, "unsubscribe": LEAVES, "punsubscribe": LEAVES, "zrevrangebyscore": OLDER,
        "config": HIDDEN, "command": HIDDEN, "unwatch": ACKNOWLEDGES,
    },
    RoleName.PRODUCER: {"role": SENTINEL, "unsubscribe": LEAVES, "script": FIRST, "smembers": EXCHANGE},
    RoleName.OPERATOR: {"role": SENTINEL, "unsubscribe": LEAVES, "script": FIRST, "smembers": EXCHANGE},
    RoleName.WATCHER: {
        "role": SENTINEL, "unsubscribe": LEAVES, "zrank": "a run that waits for its session is shown"
    },
    RoleName.FLOWER: {
        "role": SENTINEL, "unsubscribe": LEAVES, "punsubscribe": LEAVES, "zrevrangebyscore": OLDER,
        "unwatch": ACKNOWLEDGES, "hset": ACKNOWLEDGES, "lpush": ACKNOWLEDGES, "exists": "bindings expire",
        "client": "the broker's URL has a client_name",
    },
}  # fmt: skip
"""What these tests do not come by, or not always, and when it is needed."""
FILES = {"test_commands", "test_flower", "test_fundamentals"}


@pytest.fixture
def did_all(request: pytest.FixtureRequest, use: UseOfCommands) -> UseOfCommands:
    ran = {item.module.__name__.rpartition(".")[2] for item in request.session.items}
    if not ran >= FILES or not use.of(RoleName.WORKER) or not use.of(RoleName.FLOWER):
        pytest.skip("the other tests of this package did not run here")
    return use


@pytest.mark.parametrize("role", RoleName)
def test_every_command_is_used(role: RoleName, did_all: UseOfCommands) -> None:
    granted = {word[1:].partition("|")[0] for word in acl_words(role) if word.startswith("+")}
    in_scripts = {right.command.lower() for name in ROLES[role].scripts for right in Script(name, {}).rights}

    assert granted - did_all.of(role) - in_scripts <= NEEDED_ELSEWHERE[role].keys()


@pytest.mark.parametrize("role", RoleName)
def test_nothing_dangerous_is_granted(role: RoleName) -> None:
    """No command that Redis itself calls dangerous, but those that a worker reads its settings with."""
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
