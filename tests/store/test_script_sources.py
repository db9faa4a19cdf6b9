"""The sources of scripts: they contain what they use, and nothing else."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from openagents_worker.store.lua_keys import with_keys_inline
from openagents_worker.store.lua_parts import reachable_parts, without_unused
from openagents_worker.store.run_fields import MARK, run_fields_in_lua
from openagents_worker.store.scripts import lacking
from tests.support.script_calls import call

LUA = resources.files("openagents_worker.store") / "lua"
NAMES = sorted(file.name.removesuffix(".lua") for file in LUA.iterdir() if file.name.endswith(".lua"))
LIBRARY = """
-- half(n): the half
local function half(n) return n / 2 end

local TWO = 2

local function double(n)
  return n * TWO
end

local function left(n) return half(n) end
"""


def test_a_script_contains_only_the_functions_that_it_uses() -> None:
    """Also those that it uses through others. The names of fields, and words in texts, are not calls."""
    assert "function half" in without_unused(f"{LIBRARY}return left(1)")
    assert "function left" not in without_unused(f"{LIBRARY}return double(run.left) .. 'left'")
    assert "half" not in without_unused(f"{LIBRARY}return 'a'..double(1)")
    assert "local TWO = 2" in without_unused(f"{LIBRARY}return 'a'..double(1)")


def test_a_function_keeps_its_comment_and_its_place() -> None:
    script = without_unused(f"{LIBRARY}return left(1)")

    assert [line for line in script.splitlines() if line] == [
        "-- half(n): the half",
        "local function half(n) return n / 2 end",
        "local function left(n) return half(n) end",
        "return left(1)",
    ]


def test_statements_are_never_left_out() -> None:
    """A call may have an effect, although its result is not used."""
    parts = reachable_parts("local now = redis.call('TIME')\nlocal unused = 1\nredis.call('PING')")

    assert [part.code for part in parts] == ["local now = redis.call('TIME')", "redis.call('PING')"]


def test_a_script_loads_the_fields_of_a_run_that_it_mentions() -> None:
    """`state` shows whether there is a record. A counter is checked also if it is only increased."""
    lua = run_fields_in_lua(
        f"{MARK}\nreturn run.queue, run.steps, k.due(), redis.call('HINCRBY', key, 'seq', 1)"
    )

    assert "local RUN_FIELDS = {'state', 'queue', 'steps', 'seq'}\nlocal COUNTERS_FROM = 4\n" in lua
    assert "state = v_[1] or '', queue = v_[2] or '', steps = count_of(v_[3]), seq = v_[4] or ''" in lua


def test_keys_are_written_into_a_script() -> None:
    """A call whose arguments contain calls is left as it is; the script gets the function then."""
    assert with_keys_inline("k.workers()") == "(P .. ':workers')"
    assert with_keys_inline("k.facts(ids[i])") == "(P .. ':run:' .. enc(ids[i]) .. ':facts')"
    assert with_keys_inline("k.run(tostring(id))") == "k.run(tostring(id))"


@pytest.mark.parametrize("name", NAMES)
def test_a_script_defines_each_function_that_it_calls(name: str) -> None:
    """Redis would find a missing one only when the script calls it, perhaps after its first writes."""
    source = (lacking(commands=[], keys=[]) if name == "lacking" else call(name)).script.source
    code = "\n".join(line.partition("--")[0] for line in source.splitlines())
    defined = set(re.findall(r"local function (\w+)", code))

    assert set(re.findall(r"(?<![\w.:])(\w+)\(", code)) & _library_functions() <= defined
    assert set(re.findall(r"\bk\.(\w+)", code)) <= set(re.findall(r"function k\.(\w+)", code))


def _library_functions() -> set[str]:
    return {
        name
        for file in (LUA / "lib").iterdir()
        for name in re.findall(r"^local function (\w+)", file.read_text("utf-8"), re.MULTILINE)
    }
