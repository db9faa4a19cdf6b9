"""`config/acl/`: the files have exactly the rights that the code needs, and Redis accepts them."""

from __future__ import annotations

import fnmatch
from collections.abc import Generator
from importlib import resources
from pathlib import Path

import pytest
import redis

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.store import scripts
from openagents_worker.store.codec import PLAIN
from openagents_worker.store.keys import Keys
from openagents_worker.store.rights import CHANNELS, Right, rights_of, sample_of
from openagents_worker.store.roles import ROLES, RoleName, acl_line
from openagents_worker.store.scripts import Script
from tests.access.users import ACL, Guarded, acl_words, guarded

PLACEHOLDER = "REPLACE-THIS-PASSWORD"
_FOLDER = resources.files("openagents_worker.store") / "lua"
LUA = {path.name.removesuffix(".lua") for path in _FOLDER.iterdir() if path.is_file()}


@pytest.fixture(autouse=True)
def nothing_is_refused() -> None:
    """No user of a role works in these tests."""


@pytest.mark.share(of=1)
@pytest.mark.parametrize("role", RoleName)
def test_each_file_is_up_to_date(role: RoleName) -> None:
    """`python docs/generate.py` writes the files again."""
    assert (ACL / f"{role}.acl").read_text() == acl_line(ROLES[role], password=PLACEHOLDER) + "\n"


def test_every_script_belongs_to_a_role_and_all_its_commands_are_known() -> None:
    used = {name for role in ROLES.values() for name in role.scripts}
    assert used == LUA - {"lacking"}
    assert all(Script(name, {}).rights for name in used)


def test_redis_accepts_the_files(redis_of_one: Guarded, tmp_path: Path) -> None:
    """All of them in one file, as `aclfile` requires it. Users with other names are not changed."""
    users = tmp_path / "users.acl"
    text = "".join((ACL / f"{role}.acl").read_text() for role in RoleName)
    users.write_text(text if redis_of_one.can_tell_reading else text.replace("%R~", "~"))
    with EmbeddedRedis(extra={"aclfile": str(users)}) as server, redis.Redis(port=server.port) as admin:
        names = set(admin.acl_users())
    assert names == {"default", *(f"openagents-{role}" for role in RoleName)}


def test_the_rights_of_a_script_are_found_in_its_source() -> None:
    """A key in a call is exact.

    A key in a variable may be that of any call with a variable, if its type fits.

    Commands that may fail (`pcall`), commands in comments and functions that are not called need no rights.
    """
    lua = """
-- redis.call('HDEL', k.fleet(), 'x')
local function not_called() redis.call('DEL', k.due()) end
local function called()
  local key = k.journal(run_id)
  return redis.call('LLEN', key)
end
redis.pcall('PUBSUB', 'NUMSUB', k.alive(i))
redis.call('HSET', k.run(run_id), 'a', 'b')
if called() > 0 then redis.call('TIME') end
"""
    assert rights_of(lua) == {Right("LLEN", "journal"), Right("HSET", "run"), Right("TIME")}


def test_the_line_contains_the_prefix_and_the_queues() -> None:
    line = acl_line(ROLES[RoleName.WORKER], password="x", prefix="shop:{c1}", queues=("fast", "slow"), db=3)
    words = line.split()
    assert {"~shop:{c1}", "~shop:{c1}:*", "~fast*", "~slow*", "&/3.celery.pidbox"} <= set(words)
    assert not [word for word in words if word.startswith(("~oa", "~agents", "&oa", "&/0"))]


# --- each right is needed ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis_of_one() -> Generator[Guarded]:
    with guarded() as found:
        yield found


@pytest.mark.parametrize("role", [role for role in RoleName if ROLES[role].scripts])
@pytest.mark.parametrize("by_trying", [False, True], ids=["asked", "tried"])
def test_a_removed_right_is_named(redis_of_one: Guarded, role: RoleName, by_trying: bool) -> None:
    """Each command, key and channel that the scripts of a role need, one after the other.

    Redis 6 has no function to check rights, so there each command is tried in a form that changes nothing.
    This test uses both ways. Neither leaves any data.
    """
    needed = sorted(frozenset().union(*(Script(name, {}).rights for name in ROLES[role].scripts)))
    commands = [right.command for right in needed]
    samples = [sample_of(right.kind, "oa") if right.kind else "" for right in needed]
    question = scripts.lacking(commands=commands, keys=samples, by_trying=by_trying)
    words = acl_words(role)
    user, given = words[0], set(words[1:])

    def lacking(*more: str) -> list[Right]:
        redis_of_one.set_user(role, *more)
        with redis.Redis.from_url(redis_of_one.url(role), decode_responses=True) as own:
            reply = own.eval(question.script.source, 1, "oa", *question.argv((1, 1, 1)))
        return [needed[at] for at in question.decode(reply, PLAIN)]

    if by_trying and "+pexpire" not in given:
        pytest.skip("no script of this role makes a key")
    assert lacking() == []
    for command in sorted(set(commands)):
        found = lacking(f"-{command.lower().replace('|', ' ')}")
        assert {right.command for right in found} >= {command}, user
    for pattern in sorted(word for word in given if word.startswith(("~oa:", "%R~oa:"))):
        others = [word for word in words[1:] if word != pattern and "~" in word]
        kinds = {right.kind for right in lacking("resetkeys", *others)}
        if any(_is_under(sample, pattern) for sample in samples):
            assert kinds, pattern
    assert {right.kind for right in lacking("resetchannels")} == {
        right.kind for right in needed if right.kind in CHANNELS
    }
    assert redis_of_one.admin.keys("*") == []
    redis_of_one.set_user(role)


def _is_under(sample: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(sample, pattern.removeprefix("%R").removeprefix("~"))


def test_checking_rights_changes_no_data(redis_of_one: Guarded) -> None:
    """Not even keys that exist once in a cell, while a worker checks its rights."""
    keys, admin = Keys("oa"), redis_of_one.admin
    admin.zadd(keys("workers"), {"w1": 2**50})
    admin.hset(keys("agents"), "a", "{}")
    admin.zadd(keys("due"), {"r1": 1})
    before = {key: admin.dump(key) for key in sorted(admin.keys("*"))}
    needed = sorted(ROLES[RoleName.WORKER].needed)
    samples = [sample_of(right.kind, "oa") if right.kind else "" for right in needed]
    with redis.Redis.from_url(redis_of_one.url(RoleName.WORKER)) as own:
        for by_trying in (False, True):
            question = scripts.lacking(
                commands=[right.command for right in needed], keys=samples, by_trying=by_trying
            )
            assert own.eval(question.script.source, 1, "oa", *question.argv((1, 1, 1))) == []
    assert {key: admin.dump(key) for key in sorted(admin.keys("*"))} == before
    assert [admin.pttl(key) for key in before] == [-1, -1, -1]
    admin.flushall()
