"""Kept definitions: a run under way goes on with the definition it began with, as far as that is safe."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from openagents_worker.agents.code import Agent
from openagents_worker.errors import PermanentToolError, ToolRateLimitError
from openagents_worker.models import RunRecord, RunState
from openagents_worker.runtime import kept_definitions, runner
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.definitions import DefinitionStore
from openagents_worker.store.ttl import ttl_violations
from tests.runtime import plugins
from tests.runtime.kept import Later, Shown
from tests.support.runner import Process, agent, due, process, scripted
from tests.support.script_calls import call

KEY = "0123456789abcdef" * 2
LATER = {"id": "later", "impl": "tests.runtime.kept.Later"}
CALC = {"id": "calc", "type": "calc"}
SHOWN = "tests.runtime.kept.Shown"


def shown(**fields: Any) -> dict[str, Any]:
    """An agent that shows its definition."""
    config = fields.pop("config", {"system_prompt": "old"})
    fields = {"tools": [LATER, CALC], "llm": scripted(*[{"text": "old"}] * 9), **fields}
    return agent(pattern={"impl": SHOWN, "config": config}, **fields)


OLD = shown(limits={"max_tool_calls": 7}, runtime={"max_steps": 5})
NEW = shown(
    config={"system_prompt": "new"},
    limits={"max_tool_calls": 9},
    runtime={"max_steps": 6},
    llm=scripted(*[{"text": "new"}] * 9),
)
SEEN_BY_OLD = {"prompt": "old", "steps": 5, "model": "old", "most_calls": 7}
SEEN_BY_NEW = {"prompt": "new", "steps": 6, "model": "new", "most_calls": 9}


def settings(redis_url: str, key: str = "", **env: str) -> Settings:
    return load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_DEFINITIONS_KEY": key, **env})


@asynccontextmanager
async def worker(
    redis_url: str, *agents: dict[str, Any] | Agent, key: str = "", **options: Any
) -> AsyncIterator[Process]:
    """A process that keeps definitions, as every worker does."""
    given = options.pop("settings", None) or settings(redis_url, key)
    async with process(redis_url, *agents, settings=given, keeps_definitions=True, **options) as opened:
        yield opened


async def begun(one: Process, run_id: str = "r1", **fields: Any) -> None:
    """Let a run begin, and be suspended before its second call."""
    plugins.FAILURES["later"] = [ToolRateLimitError("busy", "later", retry_after_ms=1)]
    await one.submit(run_id, **fields)
    assert (await one.execute(run_id)).kind is AttemptOutcome.SUSPENDED


async def finished(two: Process, run_id: str = "r1") -> RunRecord:
    """Let this process go on with the run, to its end."""
    await due(two, run_id)
    await two.execute(run_id)
    return await two.record(run_id)


def output(record: RunRecord) -> dict[str, Any]:
    assert record.result is not None
    assert record.result.error_details is None, record.result.error_details
    found: dict[str, Any] = record.result.final_output
    return found


def part(record: RunRecord, like: Mapping[str, Any] = SEEN_BY_OLD) -> dict[str, Any]:
    return {name: value for name, value in output(record).items() if name in like}


async def handed_over(
    redis_url: str, old: dict[str, Any] | Agent, new: dict[str, Any] | Agent, *, key: str = "", **options: Any
) -> RunRecord:
    """The record of a run that a worker with the old agent begins, and one with the new agent ends."""
    async with worker(redis_url, old, key=key, **options) as one:
        await begun(one)
    async with worker(redis_url, new, key=key, **options) as two:
        return await finished(two)


def lines(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    """The fields of the log lines of this event."""
    found = [record for record in caplog.records if record.getMessage().split()[0] == event]
    return [record.__dict__["openagents_fields"] for record in found]


# --- without a key ---------------------------------------------------------------------------------------


async def test_a_run_keeps_prompt_limits_and_model(redis_url: str) -> None:
    """A worker with the new definition goes on with the old one, and begins new runs with its own."""
    async with worker(redis_url, OLD) as one:
        await begun(one)
    async with worker(redis_url, NEW) as two:
        assert part(await finished(two)) == SEEN_BY_OLD
        assert part(await two.run("r2", session_id="s2")) == SEEN_BY_NEW


async def test_a_run_that_changes_hands_several_times_keeps_its_definition(redis_url: str) -> None:
    """Also through a worker with a third definition, and back to one that has it itself."""
    third = shown(config={"system_prompt": "third"})
    async with worker(redis_url, OLD) as one:
        await begun(one)
    for definition in (NEW, OLD):
        async with worker(redis_url, definition) as next_:
            plugins.FAILURES["later"] = [ToolRateLimitError("busy", "later", retry_after_ms=1)]
            await due(next_)
            assert (await next_.execute()).kind is AttemptOutcome.SUSPENDED
    async with worker(redis_url, third) as last:
        assert part(await finished(last)) == SEEN_BY_OLD


async def test_a_tool_that_the_worker_no_longer_has_is_not_taken_from_redis(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on with the definition of the worker, and one line says why and what would help."""
    with caplog.at_level(logging.INFO):
        record = await handed_over(redis_url, OLD, {**NEW, "tools": [LATER]})

    assert part(record) == SEEN_BY_NEW
    assert output(record)["tools"] == ["later"]
    [line] = lines(caplog, "run.definition_not_kept")
    assert line["run_id"] == "r1"
    assert line["reason"] == "no agent of this worker has its tool calc, and this worker has no key"
    assert "OPENAGENTS_DEFINITIONS_KEY" in line["hint"]
    assert lines(caplog, "run.definition_kept") == []


async def test_a_tool_that_was_added_is_not_in_a_run_under_way(redis_url: str) -> None:
    record = await handed_over(redis_url, {**OLD, "tools": [LATER]}, OLD)

    assert output(record)["tools"] == ["later"]


async def test_what_differs_in_an_unknown_part_of_a_pattern_is_not_taken(redis_url: str) -> None:
    """It may be an address."""
    old = shown(config={"system_prompt": "old", "url": "http://old"})
    record = await handed_over(redis_url, old, shown(config={"system_prompt": "new", "url": "http://new"}))

    assert (output(record)["url"], output(record)["prompt"]) == ("http://new", "new")


# --- with a key ------------------------------------------------------------------------------------------


async def test_with_a_key_a_run_keeps_its_whole_definition(redis_url: str) -> None:
    """Also a tool that the agent no longer has, and an address in the config of its pattern."""
    old = {**OLD, "pattern": {"impl": SHOWN, "config": {"system_prompt": "old", "url": "http://old"}}}
    record = await handed_over(redis_url, old, {**NEW, "tools": [LATER]}, key=KEY)

    assert output(record) == {**SEEN_BY_OLD, "url": "http://old", "tools": ["calc", "later"]}


async def test_a_definition_that_another_key_has_signed_is_not_taken(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with worker(redis_url, OLD, key="fedcba9876543210" * 2) as one:
        await begun(one)
    async with worker(redis_url, {**NEW, "tools": [LATER]}, key=KEY) as two:
        record = await finished(two)

    assert output(record)["tools"] == ["later"]
    [line] = lines(caplog, "run.definition_not_kept")
    assert "its signature is not valid" in line["reason"]


async def test_a_worker_without_the_key_does_not_take_the_signature_away(redis_url: str) -> None:
    """It renews what is stored. A worker with the key adds its signature."""
    async with worker(redis_url, OLD) as unsigned, worker(redis_url, OLD, key=KEY) as signing:
        await begun(unsigned)
        await begun(signing, "r2", session_id="s2")
    async with worker(redis_url, OLD) as unsigned:
        await begun(unsigned, "r3", session_id="s3")
    async with worker(redis_url, {**NEW, "tools": [LATER]}, key=KEY) as two:
        for run_id in ("r1", "r2", "r3"):
            assert output(await finished(two, run_id))["tools"] == ["calc", "later"]


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The content hashes of the definitions that are read from now on."""
    reads: list[str] = []
    text = DefinitionStore.text

    async def counted(self: DefinitionStore, content_hash: str) -> str | None:
        reads.append(content_hash)
        return await text(self, content_hash)

    monkeypatch.setattr(DefinitionStore, "text", counted)
    return reads


async def test_a_definition_that_is_refused_is_not_read_again_for_a_minute(
    redis_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of its runs. Each of them has its log line. After that, a worker with the key may
    have signed it."""
    runs = ("r1", "r2", "r3")
    async with worker(redis_url, OLD) as one:
        for run_id in runs:
            await begun(one, run_id, session_id=run_id)
    reads = reads_of(monkeypatch)
    async with worker(redis_url, {**NEW, "tools": [LATER]}, key=KEY) as two:
        keeper, now_s = two.runner._services.assembly.keeper, 1_000.0
        keeper._clock = lambda: now_s
        for run_id in runs[:2]:
            assert part(await finished(two, run_id)) == SEEN_BY_NEW
        assert len(reads) == 1
        assert len(lines(caplog, "run.definition_not_kept")) == 2
        async with worker(redis_url, OLD, key=KEY) as signing:
            await begun(signing, "r4", session_id="r4")
        reads.clear()
        now_s += kept_definitions.REFUSED_FOR_S
        assert output(await finished(two, "r3"))["tools"] == ["calc", "later"]
        assert len(reads) == 1


async def test_a_bounded_number_of_refusals_is_remembered(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write to Redis can plant any number of definitions."""
    monkeypatch.setattr(kept_definitions, "MOST_REFUSED", 2)
    async with worker(redis_url, NEW) as two:
        for number in range(4):
            old = shown(tools=[LATER, {"id": "calc", "type": "calc", "timeout_ms": number + 1}])
            async with worker(redis_url, old, name=f"w{number}") as one:
                await begun(one, f"r{number}", session_id=f"s{number}")
            assert output(await finished(two, f"r{number}"))["prompt"] == "new"
        assert len(two.runner._services.assembly.keeper._refused) == 2


# --- agents in Python, and agents that are gone ----------------------------------------------------------


def in_python(prompt: str) -> Agent:
    llm = scripted(*[{"text": prompt}] * 9)
    return Agent("a", llm=llm, pattern=Shown, tools=[{"id": "later", "impl": Later}], system_prompt=prompt)


async def test_an_agent_in_python_keeps_its_data_and_has_the_code_of_the_process(redis_url: str) -> None:
    """Classes and functions are not stored: they are those that the process has under the same names."""
    record = await handed_over(redis_url, in_python("old"), in_python("new"))

    assert (output(record)["prompt"], output(record)["model"]) == ("old", "old")


async def test_a_run_of_an_agent_that_was_removed_is_finished(redis_url: str) -> None:
    """If no worker that is alive has the agent any more, and the definition may be used."""
    async with worker(redis_url, OLD, key=KEY) as one:
        await begun(one)
    async with worker(redis_url, agent("b"), key=KEY) as two:
        assert part(await finished(two)) == SEEN_BY_OLD


async def test_a_run_of_an_unknown_agent_is_left_to_a_worker_that_has_it(redis_url: str) -> None:
    async with worker(redis_url, OLD, key=KEY) as one, worker(redis_url, agent("b"), key=KEY) as two:
        await begun(one)
        await due(two)
        assert (await two.execute()).kind is AttemptOutcome.SUSPENDED

        names = await two.event_names()
        assert "run.left_to_others" in names
        assert (await two.record()).state is RunState.RETRYING


async def test_a_run_of_an_unknown_agent_without_a_usable_definition_is_left_as_before(
    redis_url: str,
) -> None:
    async with worker(redis_url, OLD) as one:
        await begun(one)
    async with worker(redis_url, agent("b")) as two:
        await due(two)
        assert (await two.execute()).kind is AttemptOutcome.SUSPENDED


# --- what is not kept ------------------------------------------------------------------------------------


async def test_a_run_that_is_resumed_after_its_end_has_the_new_definition(redis_url: str) -> None:
    """It was resumed because somebody has repaired what made it fail: perhaps the definition."""
    plugins.FAILURES["later"] = [PermanentToolError("broken", "later")]
    async with worker(redis_url, OLD) as one:
        record = await one.run()
        assert record.state is RunState.FAILED
        await one.store.run(call("resume"))
    async with worker(redis_url, NEW) as two:
        await two.execute()
        assert part(await two.record()) == SEEN_BY_NEW


async def test_a_run_of_an_earlier_version_goes_on_with_the_new_definition(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """That version has stored no definition."""
    async with process(redis_url, OLD) as earlier:
        await begun(earlier)
    async with worker(redis_url, NEW) as two:
        assert part(await finished(two)) == SEEN_BY_NEW
    [line] = lines(caplog, "run.definition_not_kept")
    assert line["reason"] == "it is not stored"
    assert "earlier version" in line["hint"]


async def test_an_earlier_version_goes_on_with_the_run(redis_url: str) -> None:
    """It knows nothing of stored definitions, and uses its own one."""
    async with worker(redis_url, OLD) as one:
        await begun(one)
    async with process(redis_url, NEW) as earlier:
        assert part(await finished(earlier)) == SEEN_BY_NEW


async def test_a_definition_that_is_not_valid_here_is_not_used(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """For example, a variable is not set on this machine any more. No value of a variable is in the line."""
    old = {**OLD, "name": "${PLACE}"}
    async with worker(redis_url, old, key=KEY, env={"PLACE": "Berlin-Mitte"}) as one:
        await begun(one)
    async with worker(redis_url, NEW, key=KEY) as two:
        assert part(await finished(two)) == SEEN_BY_NEW
    [line] = lines(caplog, "run.definition_not_kept")
    assert "PLACE is not set" in line["reason"]


async def test_the_same_file_with_other_variables_is_the_same_definition(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Workers on two machines have different values: nothing is loaded, and nothing is logged."""
    definition = {**OLD, "name": "${PLACE}"}
    async with worker(redis_url, definition, env={"PLACE": "Berlin-Mitte"}) as one:
        await begun(one)
    async with worker(redis_url, definition, env={"PLACE": "Hamburg-Altona"}) as two:
        assert part(await finished(two)) == SEEN_BY_OLD
    assert lines(caplog, "run.definition_not_kept") == []


async def test_a_definition_with_a_secret_is_not_stored(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis must not hold it. One line says so, and what would help."""
    secret = "sk-0123456789abcdef0123"
    old = {**OLD, "llm": {**OLD["llm"], "extra_headers": {"Authorization": f"Bearer {secret}"}}}
    async with worker(redis_url, old) as one:
        await begun(one)
        await begun(one, "r2", session_id="s2")
        stored = await one.store.redis.keys("oa:definition*")
    assert stored == []
    [line] = lines(caplog, "run.definition_not_stored")
    assert line["run_id"] == "r1"
    assert "${VARIABLE}" in line["hint"]
    assert secret not in caplog.text


# --- how it is stored ------------------------------------------------------------------------------------


async def test_a_definition_is_stored_once_and_renewed(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process stores it with the first run of an agent, and again after an hour: not with each run."""
    async with worker(redis_url, OLD) as one:
        await one.run("r1")
        keys = sorted(await one.store.redis.keys("oa:definition*"))
        assert [key.split(":")[1] for key in keys] == ["definition", "definition_of"]
        await one.store.redis.delete(*keys)
        await one.run("r2", session_id="s2")
        assert await one.store.redis.keys("oa:definition*") == []
        monkeypatch.setattr(kept_definitions, "STORE_AGAIN_S", 0)
        await one.run("r3", session_id="s3")
        assert sorted(await one.store.redis.keys("oa:definition*")) == keys
        await one.store.redis.pexpire(keys[0], 1_000)
        await one.run("r4", session_id="s4")
        assert await one.store.redis.ttl(keys[0]) > 365 * 24 * 3600
    assert ttl_violations(redis_url) == []


async def test_a_definition_outlives_runs_that_are_kept_for_a_second(redis_url: str) -> None:
    """A run may be parked for a year, whatever the time for which ended runs are kept."""
    short = settings(redis_url, OPENAGENTS_RUN_TTL_S="1")
    async with worker(redis_url, OLD, settings=short) as one:
        await begun(one)
        for key in await one.store.redis.keys("oa:definition*"):
            assert await one.store.redis.ttl(key) > 365 * 24 * 3600


async def test_a_run_that_is_not_durable_stores_nothing(redis_url: str) -> None:
    async with worker(redis_url, OLD) as one:
        await one.run(durable=False)
        assert await one.store.redis.keys("oa:definition*") == []


async def test_a_definition_is_encoded_like_other_texts(redis_url: str) -> None:
    """It contains prompts."""

    class Reversing:
        name = "reversed"

        def encode(self, text: str) -> str:
            return text[::-1]

        def decode(self, text: str) -> str:
            return text[::-1]

    codec = PayloadCodec(Reversing())
    async with worker(redis_url, OLD, codec=codec) as one:
        await begun(one)
        [key] = await one.store.redis.keys("oa:definition:*")
        assert "system_prompt" not in await one.store.redis.get(key)
    async with worker(redis_url, NEW, codec=codec) as two:
        assert part(await finished(two)) == SEEN_BY_OLD


async def test_parts_of_definitions_that_no_run_uses_are_closed(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that lives through many reloads of others keeps a bounded number of definitions."""
    monkeypatch.setattr(kept_definitions, "MOST_KEPT", 2)
    definitions = [shown(config={"system_prompt": f"old {number}"}) for number in range(4)]
    async with AsyncExitStack() as stack:
        for number, definition in enumerate(definitions):
            one = await stack.enter_async_context(worker(redis_url, definition, name=f"w{number}"))
            await begun(one, f"r{number}", session_id=f"s{number}")
        two = await stack.enter_async_context(worker(redis_url, NEW))
        for number in range(4):
            assert output(await finished(two, f"r{number}"))["prompt"] == f"old {number}"
        assembly = two.runner._services.assembly
        owners = {owner for owner, _ in assembly._shared} | set(assembly._models)
        assert len([owner for owner in owners if " " in owner]) == 2


async def test_limits_that_all_runs_share_are_those_of_now(redis_url: str) -> None:
    """Two numbers for one limit of the fleet would contradict each other."""
    limited = [
        {**definition, "llm": {**definition["llm"], "limits": {"key": "k", "requests_per_minute": number}}}
        for definition, number in ((OLD, 60), (NEW, 6_000))
    ]
    async with worker(redis_url, limited[0]) as one:
        await begun(one)
    async with worker(redis_url, limited[1]) as two:
        assert part(await finished(two)) == SEEN_BY_OLD
        stored = await two.store.redis.hgetall("oa:limit:k")
    assert "6000" in json.dumps(stored)


async def test_an_attempt_that_cannot_begin_does_not_keep_its_definition(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the process could never forget it."""

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    async with worker(redis_url, OLD) as one:
        await begun(one)
    async with worker(redis_url, NEW) as two:
        keeper = two.runner._services.assembly.keeper
        with monkeypatch.context() as patch:
            patch.setattr(runner, "Attempt", broken)
            await due(two)
            assert (await two.execute()).reason == "given_back"
        assert [kept.users for kept in keeper._kept.values() if kept is not None] == [0]
        await two.execute()
        assert part(await two.record()) == SEEN_BY_OLD
