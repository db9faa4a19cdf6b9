"""`output_type`: the output of a run is valid, or the run fails."""

from __future__ import annotations

import asyncio
import json
import threading
from datetime import date
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from openagents_worker import RunRequest, register_output
from openagents_worker.errors import CheckLimitExceeded, RequestInvalid
from openagents_worker.models import RunBudget, RunRecord, RunState
from openagents_worker.runtime.journal import Record, check_record
from openagents_worker.runtime.latch import Latch
from openagents_worker.runtime.output import FITS, OutputMismatch, OutputType
from openagents_worker.runtime.registry import OUTPUTS
from openagents_worker.runtime.replay import ReplayByContent
from openagents_worker.runtime.user_code import current_run
from openagents_worker.store import scripts
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from openagents_worker.tools.checks import SchemaChecks
from openagents_worker.tools.offload import Offload
from tests.runtime import plugins
from tests.runtime.test_replay import executed_until, open_gates, patterned, tool
from tests.support.runner import agent, calls, crash, process, scripted


class Weather(BaseModel):
    city: str
    degrees: int = Field(ge=-90, le=60)


class Booking(BaseModel):
    model_config = ConfigDict(strict=True)

    day: date


class Even(BaseModel):
    number: int

    @field_validator("number")
    @classmethod
    def _is_even(cls, number: int) -> int:
        if number % 2:
            raise ValueError("it is odd")
        return number


SCHEMA = Weather.model_json_schema()
PARIS = {"city": "Paris", "degrees": 21}


def wanting(output_type: Any) -> OutputType:
    wanted = OutputType.of(RunRequest(agent_id="a", session_id="s", input_text="hi", output_type=output_type))
    assert wanted is not None
    return wanted


async def fitted_once(output_type: Any, answer: Any) -> Any:
    """The validated output, in one attempt."""
    checks, offload = SchemaChecks(), Offload()
    try:
        return await wanting(output_type).validate(answer, checks, offload)
    finally:
        await checks.aclose()
        offload.close()


def saying(*texts: str) -> dict[str, Any]:
    return agent(llm=scripted(*({"text": text} for text in texts)))


def ended(record: RunRecord) -> tuple[RunState, Any]:
    assert record.result is not None
    details = record.result.error_details
    return record.state, details.code if details else record.result.final_output


# --- what fits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        PARIS,
        json.dumps(PARIS),
        f"```json\n{json.dumps(PARIS, indent=2)}\n```",
        Weather(**PARIS),
        f"Here is the weather:\n```json\n{json.dumps(PARIS)}\n```\nAsk me for more.",
        f"It is this (see [1]): {json.dumps(PARIS)}.",
    ],
    ids=["values", "text", "fenced text", "a model", "fenced text in prose", "an object in prose"],
)
async def test_a_valid_output_is_json_values(answer: Any) -> None:
    """In whatever form the pattern returned it."""
    assert await fitted_once(SCHEMA, answer) == PARIS


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("It is warm.", "the answer is not JSON"),
        ('{"city": "Paris", "degrees": NaN}', "NaN is not JSON"),
        ({"city": "Paris"}, "field 'degrees' is missing"),
        ({"city": "Paris", "degrees": "warm"}, "degrees: expected integer, got string"),
        ('{"city": "Paris", "degrees": 100}', "degrees: expected at most 60"),
        (None, "expected object, got null"),
    ],
)
async def test_an_invalid_output_is_explained(answer: Any, problem: str) -> None:
    """In words for the model."""
    with pytest.raises(OutputMismatch, match=problem):
        await fitted_once(SCHEMA, answer)


async def test_an_answer_with_text_around_it_needs_no_correction(redis_url: str) -> None:
    """Models like to say something before the answer. The worker dies after that, and the next one agrees."""
    prose = f"Sure! {json.dumps(PARIS)} Anything else?"
    memory = {"impl": "tests.runtime.plugins.Diary", "config": {"gate": "g"}}
    definition = agent(llm=scripted({"text": prose}), memory=memory)
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit(output_type=SCHEMA)

        async def remembers() -> bool:
            return "memory.writeback.started" in await one.event_names()

        dying = await executed_until(one, remembers, "the memory stores the turn")
        await crash(one, "r1", dying)
        open_gates("g")
        await two.execute()
        record = await two.record()

    assert ended(record) == (RunState.COMPLETED, PARIS)
    assert record.usage.llm_calls == 1


@pytest.mark.parametrize(("schema", "answer"), [({"type": "string"}, "42"), ({}, "[1]")])
async def test_a_valid_text_stays_text(schema: dict[str, Any], answer: str) -> None:
    """It is parsed as JSON only if the text itself is not valid."""
    assert await fitted_once(schema, answer) == answer


@pytest.mark.parametrize("ref", ["http://127.0.0.1:1/schema", "#/$defs/none", "#"])
async def test_a_schema_with_an_unknown_reference_fails_the_run(redis_url: str, ref: str) -> None:
    """References are not fetched."""
    async with process(redis_url, saying("{}")) as p:
        assert ended(await p.run(output_type={"$ref": ref})) == (RunState.FAILED, "request.invalid")


def test_a_schema_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a request could make a worker fetch addresses that only the worker can reach."""
    fetched: list[Any] = []
    monkeypatch.setattr("urllib.request.urlopen", fetched.append)

    with pytest.raises(RequestInvalid, match="refers to"):
        wanting({"$ref": "http://10.0.0.1/schema"})

    assert fetched == []


async def test_an_invalid_schema_fails_the_run_before_a_model_call(redis_url: str) -> None:
    async with process(redis_url, saying("{}")) as p:
        assert ended(await p.run(output_type={"type": "objekt"})) == (RunState.FAILED, "request.invalid")
        assert "llm.called" not in await p.event_names()


# --- what the provider gets ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "model"),
    [("openai_compatible", "gpt-4o"), ("openai_responses", "gpt-5"), ("anthropic", "claude-sonnet-4-5")],
)
async def test_the_schema_of_the_output_reaches_the_provider(
    redis_url: str, provider: str, model: str
) -> None:
    """Not only as an instruction in the prompt: the provider can keep the model to it."""
    asked: list[str] = []

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append(json.dumps({**request.body, "messages": [], "input": []}))
        return {"text": json.dumps(PARIS)}

    async with ModelServer(reply) as server:
        llm = {"provider": provider, "model": model, "api_base": server.url}
        async with process(redis_url, agent(llm=llm)) as p:
            record = await p.run(output_type=SCHEMA)

    assert ended(record) == (RunState.COMPLETED, PARIS)
    (body,) = asked
    assert "json_schema" in body
    assert "degrees" in body


async def test_the_schema_does_not_change_the_identity_of_a_call(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions did not send it. Their runs in progress are continued, and no call is repeated."""

    async def identities() -> list[str]:
        async with process(redis_url, saying(json.dumps(PARIS))) as p:
            await p.run(output_type=SCHEMA)
            return [e["payload"]["call"] for e in await p.events() if e["name"] == "llm.called"]

    now = await identities()
    monkeypatch.setattr("openagents_worker.runtime.prepare.response_format", lambda *_: None)

    assert await identities() == now


# --- trying again ----------------------------------------------------------------------------------------


async def test_the_model_corrects_an_invalid_output(redis_url: str) -> None:
    """Each retry is one event. Result, terminal event and transcript have the valid output."""
    async with process(redis_url, saying("warm", '{"city": "Paris"}', json.dumps(PARIS))) as p:
        record = await p.run(output_type=SCHEMA)
        retries = [e["payload"] for e in await p.events() if e["name"] == "validation.retry"]
        (completed,) = [e["payload"] for e in await p.events() if e["name"] == "run.completed"]
        transcript = await p.transcript()

    assert ended(record) == (RunState.COMPLETED, PARIS)
    assert [retry["attempt"] for retry in retries] == [1, 2]
    assert retries[1]["error"] == "field 'degrees' is missing"
    assert completed["result"] == PARIS
    assert json.loads(transcript[1]["content"]) == PARIS


@pytest.mark.parametrize(("limit", "answers"), [(None, 4), (1, 2), (0, 1)])
async def test_the_run_fails_after_the_last_invalid_output(
    redis_url: str, limit: int | None, answers: int
) -> None:
    """`budget.max_validation_retries` limits the corrections; the default is three."""
    async with process(redis_url, saying(*["warm"] * 9)) as p:
        record = await p.run(output_type=SCHEMA, budget=RunBudget(max_validation_retries=limit))

    assert ended(record) == (RunState.FAILED, "execution.output_validation")
    assert record.usage.llm_calls == answers
    assert record.result is not None
    assert record.result.error_details is not None
    assert record.result.error_details.context["attempts"] == answers
    assert record.result.error_details.context["output_type"] == "Weather"


async def test_no_tool_is_called_again_for_an_invalid_output(redis_url: str) -> None:
    """ReAct continues the conversation, and keeps counting steps."""
    charge = {"id": "charge", "impl": "tests.runtime.plugins.Charge"}
    script = scripted(calls(("charge", {"who": "ada"})), {"text": "done"}, {"text": json.dumps(PARIS)})
    async with process(redis_url, agent(llm=script, tools=[charge])) as p:
        record = await p.run(output_type=SCHEMA)

    assert ended(record) == (RunState.COMPLETED, PARIS)
    assert plugins.executed("charge") == ["ada"]


async def test_corrections_count_as_steps(redis_url: str) -> None:
    """`max_steps` limits the run, not one output."""
    async with process(redis_url, saying(*["warm"] * 9)) as p:
        record = await p.run(output_type=SCHEMA, budget=RunBudget(max_steps=2))

    assert ended(record) == (RunState.FAILED, "execution.max_steps")
    assert record.usage.llm_calls == 2


async def test_the_model_corrects_the_output_of_a_custom_pattern(redis_url: str) -> None:
    """Without `try_again`, the model gets the output and the problem. No tools are called."""
    open_gates("charge-0")
    steps = {**patterned("Steps", tool("Charge"), n=1), "llm": scripted({"text": json.dumps(PARIS)})}
    async with process(redis_url, steps) as p:
        record = await p.run(output_type=SCHEMA)

    assert ended(record) == (RunState.COMPLETED, PARIS)
    assert plugins.executed("charge") == [0]


async def test_a_run_without_output_type_is_not_validated(redis_url: str) -> None:
    async with process(redis_url, saying('{"city": "Paris"}')) as p:
        assert ended(await p.run()) == (RunState.COMPLETED, '{"city": "Paris"}')


async def test_attempts_are_counted_across_workers(redis_url: str) -> None:
    """Invalid outputs are in the journal: they are neither paid for nor reported twice."""
    script = scripted({"text": "warm"}, calls(("charge", {"who": "ada", "gate": "g"})), {"text": "hot"})
    definition = agent(llm=script, tools=[{"id": "charge", "impl": "tests.runtime.plugins.Charge"}])
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):
        await one.submit(output_type=SCHEMA, budget=RunBudget(max_validation_retries=1))
        dying = await executed_until(
            one, lambda: any(e[:2] == ("begin", "charge") for e in plugins.LOG), "the second answer begins"
        )
        await crash(one, "r1", dying)
        open_gates("g")
        await two.execute()
        record = await two.record()
        names = await two.event_names()

    assert ended(record) == (RunState.FAILED, "execution.output_validation")
    assert record.usage.llm_calls == 3
    assert names.count("validation.retry") == 1


async def test_a_resumed_run_has_its_attempts_again(redis_url: str) -> None:
    """Its earlier outputs are replayed."""
    async with process(redis_url, saying("warm", "hot", "mild", json.dumps(PARIS))) as p:
        failed = await p.run(output_type=SCHEMA, budget=RunBudget(max_validation_retries=1))
        await p.store.run(
            scripts.resume(run_id="r1", agent_id="a", session_id="s1", input_text="", checkpoint_id="")
        )
        await p.execute()
        record = await p.record()
        retries = [e["payload"]["attempt"] for e in await p.events() if e["name"] == "validation.retry"]

    assert ended(failed) == (RunState.FAILED, "execution.output_validation")
    assert ended(record) == (RunState.COMPLETED, PARIS)
    assert (failed.usage.llm_calls, record.usage.llm_calls) == (2, 4)
    assert retries == [1, 2, 3]


async def test_an_endless_regular_expression_fails_only_its_run(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run of the same process completes meanwhile. The model is not called again."""
    monkeypatch.setattr(SchemaChecks.__init__, "__kwdefaults__", {"cpu_s": 0.3, "processes": 1})
    async with process(redis_url, saying("a" * 40 + "!")) as p:
        await p.submit("r1", output_type={"type": "string", "pattern": "^(a+)+$"})
        await p.submit("r2", session_id="s2")
        await asyncio.gather(p.execute("r1"), p.execute("r2"))
        hostile, other = await p.record("r1"), await p.record("r2")

    assert ended(hostile) == (RunState.FAILED, "execution.check_limit")
    assert ended(other) == (RunState.COMPLETED, "a" * 40 + "!")
    assert hostile.usage.llm_calls == 1


# --- a check is made once --------------------------------------------------------------------------------


class Checks:
    """Checks whose result for outputs differs in every process, as in another version."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        self.gives: str | Exception | None = None
        monkeypatch.setattr(SchemaChecks, "mistakes", self._mistakes)

    async def _mistakes(self, schema: Any, value: Any, part: str) -> str | None:
        if part == "argument":
            return None
        self.made += 1
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives


@pytest.mark.parametrize("first", [None, "it is too warm"])
async def test_the_result_of_a_check_is_replayed(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, first: str | None
) -> None:
    """The worker dies after the check. On the next one the check would end differently."""
    checks = Checks(monkeypatch)
    checks.gives = first
    monkeypatch.setattr(plugins.Diary, "kept", [])
    script = scripted({"text": "[1]"}, calls(("charge", {"who": "ada", "gate": "g"})), {"text": "[2]"})
    definition = agent(
        llm=script,
        tools=[{"id": "charge", "impl": "tests.runtime.plugins.Charge"}],
        memory={"impl": "tests.runtime.plugins.Diary", "config": {"gate": "g"}},
    )
    async with (
        process(redis_url, definition, name="one") as one,
        process(redis_url, definition, name="two") as two,
    ):

        async def is_stored() -> bool:
            return "check" in [record["kind"] for record in await one.journal()]

        await one.submit(output_type=SCHEMA)
        dying = await executed_until(one, is_stored, "the check is recorded")
        made = checks.made
        await crash(one, "r1", dying)
        checks.gives = None if first else CheckLimitExceeded("the check was given up")
        open_gates("g")
        await two.execute()
        record = await two.record()
        retries = [e["payload"]["error"] for e in await two.events() if e["name"] == "validation.retry"]

    assert ended(record) == (RunState.COMPLETED, "[2]" if first else "[1]")
    assert retries == ([first] if first else [])
    assert checks.made == made + (1 if first else 0), "only the second answer is checked by the second worker"


async def test_a_check_that_failed_a_life_is_repeated_in_the_next(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is resumed after the limit was raised."""
    checks = Checks(monkeypatch)
    checks.gives = CheckLimitExceeded("the check was given up")
    async with process(redis_url, saying("[1]")) as p:
        failed = await p.run(output_type=SCHEMA)
        checks.gives = None
        await p.store.run(
            scripts.resume(run_id="r1", agent_id="a", session_id="s1", input_text="", checkpoint_id="")
        )
        await p.execute()
        record = await p.record()

    assert ended(failed) == (RunState.FAILED, "execution.check_limit")
    assert ended(record) == (RunState.COMPLETED, "[1]")


async def test_the_previous_version_ignores_the_record_of_a_check() -> None:
    """It does not know such records, and would fail a run with a call that was not made."""
    record = check_record("k1", {"ok": FITS}, life=1)

    rules = ReplayByContent([Record.from_json(record.to_json(), 1)], life=1, latch=Latch(), tries={})

    assert rules.is_replay_over
    assert await rules.unused_records("") == []


# --- names and classes -----------------------------------------------------------------------------------


async def test_the_validators_of_a_registered_class_do_not_run_on_the_loop(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are user code and can take long. A validator that still executes is named."""
    ran_in: list[tuple[str, list[str]]] = []

    class Slow(BaseModel):
        number: int

        @field_validator("number")
        @classmethod
        def _takes_long(cls, number: int) -> int:
            run = current_run.get()
            assert run is not None
            ran_in.append((threading.current_thread().name, run.off_loop.names()))
            return number

    monkeypatch.setattr(OUTPUTS, "_by_name", {})
    register_output("slow", Slow)
    async with process(redis_url, saying('{"number": 3}')) as p:
        record = await p.run(output_type="slow")

    assert ended(record) == (RunState.COMPLETED, {"number": 3})
    assert ran_in == [("openagents-tool-1", ["output type slow"])]


async def test_a_registered_class_with_an_invalid_schema_is_a_deployment_error(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The producer knows only its name."""

    class Letters(BaseModel):
        text: str = Field(pattern=r"^\p{L}+$")

    monkeypatch.setattr(OUTPUTS, "_by_name", {})
    register_output("letters", Letters)
    async with process(redis_url, saying('{"text": "a"}')) as p:
        record = await p.run(output_type="letters")

    assert ended(record) == (RunState.FAILED, "plugin.config")


async def test_a_strict_registered_model_takes_what_json_has_for_it(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A date is a text in JSON."""
    monkeypatch.setattr(OUTPUTS, "_by_name", {})
    register_output("booking", Booking)
    async with process(redis_url, saying('{"day": "2026-01-31"}')) as p:
        record = await p.run(output_type="booking")

    assert ended(record) == (RunState.COMPLETED, {"day": "2026-01-31"})
    assert record.usage.llm_calls == 1


async def test_the_validators_of_a_registered_model_are_used(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They execute on the worker, while the model can still correct the output."""
    monkeypatch.setattr(OUTPUTS, "_by_name", {})
    register_output("even", Even)
    async with process(redis_url, saying('{"number": 3}', '{"number": 4}')) as p:
        record = await p.run(output_type="even")
        (retry,) = [e["payload"] for e in await p.events() if e["name"] == "validation.retry"]
        unknown = await p.run("r2", output_type="evn")

    assert ended(record) == (RunState.COMPLETED, {"number": 4})
    assert retry["error"] == "number: Value error, it is odd"
    assert ended(unknown) == (RunState.FAILED, "plugin.load")
    assert unknown.result is not None
    assert unknown.result.error_details is not None
    assert "did you mean 'even'?" in unknown.result.error_details.message
