"""Every error code is caused in the way that `docs/errors.md` describes, and seen as by an application.

One function a code. What a producer meets is raised by the library; what ends a run comes out of a real
worker as the run's `error_details`. `@provokes` collects the functions, and a code that has none is named.
"""

from __future__ import annotations

import ast
import asyncio
import json
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import aclosing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import openagents_worker
from openagents_worker import errors
from openagents_worker.agents import load_agents
from openagents_worker.errors import RAISED_BY_PLUGINS, OpenAgentsError, RunFailed, error_classes
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import ErrorDetails
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.producer.handle import RunHandle
from openagents_worker.producer.sse import sse
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.formats import HOLDS_TURNS, NEWEST_READ
from tests.errors.plugins import HINT, PAYMENTS
from tests.support import runner as harness
from tests.support.deployment import PATIENCE_S, Installation, agent, call, installed
from tests.support.lossy_proxy import Proxy, closed_port
from tests.support.scripts import Hand
from tests.support.waiting import await_for, wait_for

LIBRARY = Path(openagents_worker.__file__).parent
PLUGINS = "tests.errors.plugins"
GOOD = {"agent_id": "clerk", "session_id": "s1", "input_text": "Go."}
MAX_BYTES = 20_000
NO_RETRY = {"max_resume_attempts": 0}

DECLARED = {
    cls.code: cls
    for cls in error_classes()
    if cls.__module__ == errors.__name__ and cls is not RunFailed and not cls.__name__.startswith("_")
}

Met = OpenAgentsError | ErrorDetails
Provocation = Callable[[Installation], Met]
PROVOCATIONS: dict[str, Provocation] = {}


def provokes(code: str) -> Callable[[Provocation], Provocation]:
    def collect(provocation: Provocation) -> Provocation:
        assert code not in PROVOCATIONS, f"{code} has a provocation already"
        PROVOCATIONS[code] = provocation
        return provocation

    return collect


# --- what a producer meets -------------------------------------------------------------------------------


@provokes("request.invalid")
def a_field_is_missing(shop: Installation) -> Met:
    return raised(lambda: shop.run_agent.delay({"agent_id": "clerk"}))


@provokes("request.too_large")
def the_input_is_larger_than_a_payload_may_be(shop: Installation) -> Met:
    return raised(lambda: shop.run_agent.delay({**GOOD, "input_text": "x" * MAX_BYTES}))


@provokes("request.two_arguments")
def a_chain_passes_a_value_to_a_run_with_a_request(shop: Installation) -> Met:
    return raised(lambda: shop.run_agent.s(GOOD).clone(args=({"run_id": "r0"},)).apply_async())


@provokes("run.not_found")
def a_run_is_asked_for_that_never_was(shop: Installation) -> Met:
    return raised(shop.client.handle("nobody").record)


@provokes("run.conflict")
def a_run_id_is_used_for_another_request(shop: Installation) -> Met:
    taken = hanging(shop, run_id="taken")
    met = raised(lambda: shop.run_agent.delay({**GOOD, "run_id": "taken"}))
    taken.cancel()
    return met


@provokes("run.other_format")
def a_record_is_of_a_version_to_come(shop: Installation) -> Met:
    taken = hanging(shop, run_id="from-tomorrow")
    redis, key = shop.client.store.redis, shop.client.store.keys("run", taken.id)
    today = redis.hmget(key, ["format", "usage"])
    redis.hset(key, mapping={"format": NEWEST_READ + 1, "usage": '{"llm_calls": "other words"}'})
    met = raised(taken.record)
    redis.hset(key, mapping={"format": today[0], "usage": today[1] or "{}"})
    taken.cancel()
    return met


@provokes("record.unreadable")
def somebody_else_writes_into_a_record(shop: Installation) -> Met:
    taken = hanging(shop, run_id="overwritten")
    redis, key = shop.client.store.redis, shop.client.store.keys("run", taken.id)
    created = redis.hget(key, "created")
    redis.hset(key, "created", "yesterday")
    met = raised(taken.record)
    redis.hset(key, "created", created or "")
    taken.cancel()
    return met


@provokes("run.held_turns_expired")
def a_run_began_with_the_turns_of_a_run_that_has_expired(shop: Installation) -> Met:
    shop.model.will_say({"text": "done"})
    child = shop.submit("clerk")
    child.wait(timeout=PATIENCE_S)
    redis, keys = shop.client.store.redis, shop.client.store.keys
    start = json.loads(redis.lindex(keys("journal", child.id), 0) or "")
    start["outcome"]["context"] = {"held": ["expired", 0, 2]}
    redis.lset(keys("journal", child.id), 0, json.dumps(start))
    redis.hset(keys("run", child.id), "format", HOLDS_TURNS)
    return raised(lambda: child.fork(f"{child.id}:step:0"))


@provokes("agent.unavailable")
def an_agent_was_announced_by_a_worker_that_does_not_come_back(shop: Installation) -> Met:
    with Hand(shop.stack.redis_url) as hand:
        hand.register("ghost")
        return ended(shop.submit("ghost"))


@provokes("session.busy")
def a_session_has_a_run_and_the_request_would_not_wait(shop: Installation) -> Met:
    busy = hanging(shop, session_id="busy")
    met = raised(lambda: shop.submit("clerk", session_id="busy", on_busy="reject"))
    busy.cancel()
    return met


@provokes("session.not_found")
def a_session_is_asked_for_that_never_was(shop: Installation) -> Met:
    return raised(lambda: shop.client.session("nowhere"))


@provokes("user.agent_not_found")
def no_worker_has_such_an_agent(shop: Installation) -> Met:
    return raised(lambda: shop.submit("clrk"))


@provokes("watch.too_many")
def one_page_more_follows_a_run_than_may(shop: Installation) -> Met:
    settings = load_settings({"OPENAGENTS_REDIS_URL": shop.stack.redis_url, "OPENAGENTS_MAX_WATCHERS": "1"})
    hanging_run = hanging(shop)

    async def watch_twice() -> OpenAgentsError:
        async with (
            AsyncClient(settings=settings) as client,
            aclosing(sse(client.handle(hanging_run.id))) as first,
        ):
            await anext(first)
            return raised(lambda: sse(client.handle(hanging_run.id)))

    try:
        return asyncio.run(watch_twice())
    finally:
        hanging_run.cancel()


@provokes("redis.unreachable")
def nobody_listens_where_redis_should_be(shop: Installation) -> Met:
    with Client(f"redis://127.0.0.1:{closed_port()}/0") as client:
        return raised(lambda: client.submit(GOOD))


@provokes("redis.refused")
def redis_does_not_know_a_command(shop: Installation) -> Met:
    """As where a server between us and Redis takes only some of its commands."""
    return raised(lambda: shop.client.store.ask(lambda r: r.execute_command("NO-SUCH-COMMAND")))


@provokes("redis.no_permission")
def the_user_of_redis_may_run_no_script(shop: Installation) -> Met:
    with EmbeddedRedis() as server, Client(server.url) as client:
        client.store.redis.execute_command("ACL", "SETUSER", "default", "-@scripting")
        return raised(lambda: client.submit(GOOD))


@provokes("redis.wrong_type")
def the_record_of_a_run_is_something_else(shop: Installation) -> Met:
    key = shop.client.store.keys("run", "something-else")
    shop.client.store.redis.set(key, "x", ex=60)
    return raised(lambda: shop.run_agent.delay({**GOOD, "run_id": "something-else"}))


@provokes("run.submit_unknown")
def the_line_breaks_after_the_request_was_sent(shop: Installation) -> Met:
    with Proxy(shop.stack.redis_url) as proxy, Client(proxy.url) as client:
        proxy.lose_answer_to = lambda data: b"EVAL" in data
        met = raised(lambda: client.submit({**GOOD, "run_id": "unheard", "session_id": "unheard"}))
    shop.client.cancel("unheard")
    return met


# --- configuration ---------------------------------------------------------------------------------------


@provokes("config.error")
def a_producer_is_to_carry_a_run(shop: Installation) -> Met:
    return raised(lambda: shop.run_agent.apply((GOOD,)))


@provokes("config.validation")
def a_setting_is_no_number(shop: Installation) -> Met:
    return raised(lambda: load_settings({"OPENAGENTS_LEASE_MS": "soon"}))


@provokes("config.load")
def there_is_no_agents_file(shop: Installation) -> Met:
    return raised(lambda: load_agents(shop.folder / "missing.json", env={}))


@provokes("config.broker")
def celery_does_not_know_the_broker(shop: Installation) -> Met:
    settings = load_settings({"OPENAGENTS_BROKER_URL": "pigeon://roof"})
    return raised(lambda: Client(settings=settings))


@provokes("redis.unsafe")
def an_answer_from_the_disk_is_wanted_of_a_redis_without_one(shop: Installation) -> Met:
    with EmbeddedRedis() as server:
        env = {"OPENAGENTS_REDIS_URL": server.url, "OPENAGENTS_DURABILITY": "strict"}
        with Client(settings=load_settings(env)) as client:
            return raised(lambda: client.submit(GOOD))


@provokes("plugin.load")
def a_tool_is_nowhere(shop: Installation) -> Met:
    return loading(shop, agent("a", tools={"missing": f"{PLUGINS}.missing"}))


@provokes("plugin.config")
def a_pattern_is_configured_with_what_it_does_not_know(shop: Installation) -> Met:
    return loading(shop, agent("a", pattern={"type": "react", "config": {"max_stepps": 3}}))


# --- what ends a run -------------------------------------------------------------------------------------


@provokes("execution.max_steps")
def the_steps_are_used_up(shop: Installation) -> Met:
    shop.model.will_say({"tool_calls": [call("echo", number=1)]})
    return ended(shop.submit("clerk", budget={"max_steps": 1}))


@provokes("execution.budget_exhausted")
def the_time_is_used_up(shop: Installation) -> Met:
    shop.model.will_say({"error": "hang"})
    return ended(shop.submit("clerk", budget={"max_duration_ms": 50}))


@provokes("execution.error")
def a_pattern_cancels_itself(shop: Installation) -> Met:
    return ended(shop.submit("quitter"))


@provokes("pattern.error")
def a_pattern_has_a_bug(shop: Installation) -> Met:
    return ended(shop.submit("buggy"))


@provokes("execution.output_validation")
def the_answer_is_of_another_type(shop: Installation) -> Met:
    shop.model.will_say({"text": "as you like it"})
    return ended(shop.submit("clerk", output_type={"type": "object"}, budget={"max_validation_retries": 0}))


@provokes("execution.check_limit")
def the_answer_takes_a_pattern_for_ever(shop: Installation) -> Met:
    shop.model.will_say({"text": "a" * 40 + "!"})
    return ended(shop.submit("clerk", output_type={"type": "string", "pattern": "^(a+)+$"}))


@provokes("deps.unavailable")
def what_the_tools_need_is_away(shop: Installation) -> Met:
    return ended(shop.submit("clerk", deps="closed", budget=NO_RETRY))


@provokes("pattern.step_timeout")
def a_step_takes_too_long(shop: Installation) -> Met:
    shop.model.will_say({"error": "hang"})
    return ended(shop.submit("hasty", budget=NO_RETRY))


@provokes("signal.timeout")
def nobody_sends_a_value_in_time(shop: Installation) -> Met:
    shop.model.will_say({"tool_calls": [call("await_answer")]})
    return ended(shop.submit("clerk"))


@provokes("child.failed")
def an_agent_fails_that_another_one_asks(shop: Installation) -> Met:
    return ended(shop.submit("asker"))


@provokes("delegation.depth")
def an_agent_delegates_to_itself(shop: Installation) -> Met:
    return ended(shop.submit("endless"))


@provokes("session.error")
def something_else_uses_the_memorys_place_in_the_session(shop: Installation) -> Met:
    shop.model.will_say({"tool_calls": [call("spoil")]}, {"text": "done"})
    return ended(shop.submit("strict"))


@provokes("step.too_large")
def a_reply_is_larger_than_a_payload_may_be(shop: Installation) -> Met:
    shop.model.will_say({"text": "x" * MAX_BYTES})
    return ended(shop.submit("clerk"))


@provokes("step.failed")
def a_function_of_a_program_has_a_bug(shop: Installation) -> Met:
    return ended(shop.submit("scribe"))


@provokes("step.too_deep")
def a_tool_gives_lists_in_lists(shop: Installation) -> Met:
    shop.model.will_say({"tool_calls": [call("pile")]}, {"text": "never"})
    return ended(shop.submit("clerk"))


@provokes("run.cancelled")
def a_run_is_cancelled(shop: Installation) -> Met:
    handle = hanging(shop)
    handle.cancel()
    return ended(handle)


@provokes("run.replay_mismatch")
def a_patterns_chance_is_not_recorded(shop: Installation) -> Met:
    return ended(shop.submit("drifting"))


@provokes("run.definition_changed")
def an_agent_is_changed_while_its_run_waits(shop: Installation) -> Met:
    """A worker with the old agents file starts the run; a worker with the new agents file continues."""
    yesterday = numbers("changed", [1, -1])

    async def begin() -> None:
        async with harness.process(shop.stack.redis_url, yesterday) as worker:
            await worker.submit("old", agent_id="changed", session_id="old")
            assert (await worker.execute("old")).reason == "tool.rate_limit"

    asyncio.run(begin())
    return ended(shop.client.handle("old"))


@provokes("worker.lost")
def a_worker_dies_with_a_run_that_is_not_durable(shop: Installation) -> Met:
    with Hand(shop.stack.redis_url) as hand:
        hand.register("assistant")
        hand.submit("lost", "lost", queue="nobody", durable=False)
        dies(hand, "lost")
        return ended(shop.client.handle("lost"))


@provokes("run.poisoned")
def a_run_makes_its_workers_die(shop: Installation) -> Met:
    with Hand(shop.stack.redis_url) as hand:
        hand.register("assistant")
        hand.submit("poison", "poison", queue="nobody")
        # The installation forgives one death, and those in the first seconds of its Redis.
        for deaths in range(1, 100):
            dies(hand, "poison")
            wait_for(partial(recovered, shop, "poison", deaths), "it is recovered")
            if shop.client.record("poison").state.is_terminal:
                break
        shop.client.store.ask(lambda r: r.delete("nobody.wake"))
        return ended(shop.client.handle("poison"))


@provokes("approval.timeout")
def nobody_decides_about_a_payment_in_time(shop: Installation) -> Met:
    return ended(shop.client.submit({**GOOD, "agent_id": "hesitant", "session_id": "hesitant"}))


@provokes("approval.not_pending")
def somebody_approves_what_nobody_asked_about(shop: Installation) -> Met:
    handle = hanging(shop, session_id="approved")
    try:
        return raised(lambda: handle.approve("pay:00:1", by="anna"))
    finally:
        handle.cancel()


@provokes("run.outcome_unknown")
def a_worker_dies_while_it_pays(shop: Installation) -> Met:
    tools = [{"id": "pay", "impl": f"{PLUGINS}.pay", "on_interrupted": "fail"}]
    payer = harness.agent("payer", tools=tools, pattern={"impl": f"{PLUGINS}.Pays"})
    url = (
        shop.stack.redis_url.removesuffix("/0") + "/1"
    )  # else the worker of the shop may reclaim the run first

    async def interrupted() -> None:
        async with (
            harness.process(url, payer, name="one") as one,
            harness.process(url, payer, name="two") as two,
        ):
            await one.submit("paid", agent_id="payer", session_id="paid")
            dying = asyncio.create_task(one.execute("paid"))
            await await_for(lambda: PAYMENTS == ["begun"], "it begins to pay")
            await harness.crash(one, "paid", dying)
            await two.execute("paid")

    asyncio.run(interrupted())
    with Client(url) as client:
        return ended(client.handle("paid"))


# --- what goes wrong in a tool ---------------------------------------------------------------------------


@provokes("tool.error")
def a_tool_has_a_bug(shop: Installation) -> Met:
    return calling(shop, call("crash"))


@provokes("tool.timeout")
def a_tool_takes_too_long(shop: Installation) -> Met:
    return calling(shop, call("dawdle"))


@provokes("tool.rate_limit")
def a_server_has_had_too_many_requests(shop: Installation) -> Met:
    with answering(429) as url:
        return calling(shop, call("http", url=url))


@provokes("tool.unavailable")
def a_server_is_not_there(shop: Installation) -> Met:
    return calling(shop, call("http", url=f"http://127.0.0.1:{closed_port()}/"))


@provokes("tool.auth")
def a_service_wants_a_key_that_is_not_there(shop: Installation) -> Met:
    return calling(shop, call("web", query="tea"))


@provokes("tool.permanent")
def a_tool_may_not_go_there(shop: Installation) -> Met:
    return calling(shop, call("http", url="http://elsewhere.invalid/"))


@provokes("tool.cancelled")
def a_job_is_cancelled_at_its_service(shop: Installation) -> Met:
    return calling(shop, call("cancelled"))


@provokes("tool.not_found")
def the_model_asks_for_a_tool_that_is_not_there(shop: Installation) -> Met:
    return calling(shop, call("ecco", number=1))


@provokes("tool.validation")
def the_model_gives_arguments_of_another_type(shop: Installation) -> Met:
    return calling(shop, call("echo", number="many"))


# --- what goes wrong with a model ------------------------------------------------------------------------


@provokes("llm.connection")
def the_model_hangs_up(shop: Installation) -> Met:
    shop.model.will_say({"error": "connection", "times": 9}, {"text": "never"})
    return ended(shop.submit("clerk", budget=NO_RETRY))


@provokes("llm.rate_limit")
def the_model_asks_for_patience_again_and_again(shop: Installation) -> Met:
    shop.model.will_say({"error": "rate_limit", "times": 9}, {"text": "never"})
    return ended(shop.submit("clerk", budget=NO_RETRY))


@provokes("llm.response")
def the_model_refuses_the_request(shop: Installation) -> Met:
    shop.model.will_say({"error": "response", "times": 9}, {"text": "never"})
    return ended(shop.submit("clerk"))


@provokes("llm.too_large")
def the_model_says_more_than_is_read(shop: Installation) -> Met:
    shop.model.will_say({"text": "x" * 2_000}, {"text": "never"})
    return ended(shop.submit("short-eared"))


def replying(shop: Installation, **reply: Any) -> ErrorDetails:
    """How a run ends whose model gives this reply."""
    shop.model.will_say(reply, {"text": "never"})
    return ended(shop.submit("clerk", budget=NO_RETRY))


@provokes("llm.auth")
def the_key_is_rejected(shop: Installation) -> Met:
    return replying(shop, error="response", status=401)


@provokes("llm.context_length")
def the_question_is_longer_than_the_context(shop: Installation) -> Met:
    return replying(shop, error="response", message="prompt is too long")


@provokes("llm.filtered")
def the_question_is_blocked_by_a_filter(shop: Installation) -> Met:
    return replying(shop, error="response", message="content_filter")


@provokes("llm.truncated")
def the_answer_is_cut(shop: Installation) -> Met:
    return replying(shop, text="The answer is", finish_reason="length")


@provokes("llm.refused")
def the_model_refuses_to_answer(shop: Installation) -> Met:
    return replying(shop, text="I cannot.", finish_reason="refusal")


@provokes("llm.empty")
def the_answer_has_no_text(shop: Installation) -> Met:
    return replying(shop, text="")


# --- what only plugins raise -----------------------------------------------------------------------------


def a_plugin_raises(code: str) -> Provocation:
    def provocation(shop: Installation) -> Met:
        met = ended(shop.submit("passing-on", code, budget=NO_RETRY))
        assert (met.message, met.hint) == (f"the plugin says {code}", HINT)
        return met

    return provocation


for cls in RAISED_BY_PLUGINS:
    provokes(cls.code)(a_plugin_raises(cls.code))


# --- the tests -------------------------------------------------------------------------------------------


OWN_TOOLS = ("await_answer", "complain", "crash", "dawdle", "echo", "pile", "spoil")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Installation]:
    own = {name: f"{PLUGINS}.{name}" for name in OWN_TOOLS} | {"cancelled": f"{PLUGINS}.Cancelled"}
    http = {"type": "http_request", "config": {"allow_hosts": ["127.0.0.1"]}}
    react = {"type": "react", "config": {"max_tool_errors_in_a_row": 1}}
    agents = [
        agent("clerk", tools={**own, "http": http, "web": {"type": "tavily_search"}}, pattern=react),
        agent("scribe", pattern={"impl": f"{PLUGINS}.scribe"}),
        agent("hasty", pattern={"type": "react", "config": {"step_timeout_ms": 50}}),
        agent("strict", tools=own, memory={"type": "buffer", "on_error": "fail"}),
        agent("asker", tools={"ask": {"type": "delegate"}}, pattern={"impl": f"{PLUGINS}.asker"}),
        agent("endless", pattern={"impl": f"{PLUGINS}.endless"}),
        agent("quitter", pattern={"impl": f"{PLUGINS}.Quitter"}),
        agent("buggy", pattern={"impl": f"{PLUGINS}.Buggy"}),
        agent("short-eared", llm={"max_reply_bytes": 1_024}),
        agent("passing-on", tools=own, pattern={"impl": f"{PLUGINS}.PassesOn"}),
        numbers("drifting", [1, -1], drifts=True),
        harness.agent(
            "hesitant",
            tools=[
                {
                    "id": "pay",
                    "impl": f"{PLUGINS}.pay",
                    "approval": "always",
                    "approval_timeout_ms": 1,
                    "approval_default": "fail",
                }
            ],
            pattern={"impl": f"{PLUGINS}.Pays"},
        ),
        numbers("changed", [2]),
    ]
    env = {"OPENAGENTS_MAX_PAYLOAD_BYTES": str(MAX_BYTES), "OPENAGENTS_MAX_RECOVERIES": "1"}
    env["OPENAGENTS_LEFT_TO_OTHERS_MAX_S"] = "1"
    with installed(tmp_path_factory.mktemp("errors"), *agents, **env) as installation:
        yield installation


@pytest.mark.parametrize("code", sorted(PROVOCATIONS))
def test_a_code_is_met_where_its_meaning_says(
    shop: Installation, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """Raised by the library or reported by a worker; retryable as its class, and with a readable message."""
    monkeypatch.setenv("OPENAGENTS_MAX_PAYLOAD_BYTES", str(MAX_BYTES))

    met = PROVOCATIONS[code](shop)

    assert met.code == code
    assert met.retryable is DECLARED[code].retryable
    assert met.message
    if isinstance(met, OpenAgentsError):
        assert type(met) is DECLARED[code]
        frames = [frame for frame, _ in traceback.walk_tb(met.__traceback__)]
        assert Path(frames[-1].f_code.co_filename).is_relative_to(LIBRARY), "raised by a test"


def test_what_is_none_of_ours_has_a_code_too(shop: Installation) -> None:
    """As the cause of the error that tells where it happened; it is never the first."""
    met = ended(shop.submit("buggy"))

    assert met.cause is not None
    assert (met.cause.code, met.cause.message) == ("error.unknown", "LookupError: nothing there")


def test_every_declared_code_is_met() -> None:
    """A new code needs a provocation, and one that nothing provokes any more is not declared."""
    assert set(DECLARED) - set(PROVOCATIONS) == set(), "nobody shows how these are met"
    assert set(PROVOCATIONS) - set(DECLARED) == set(), "nobody declares these"


def test_what_only_plugins_raise_is_raised_nowhere_in_the_library() -> None:
    """Or it would have to be provoked there."""
    names = {cls.__name__ for cls in RAISED_BY_PLUGINS}
    not_raised = {
        ("tool_calls.py", "ToolCancelledError"),  # what the model is told about an interrupted call
        ("errors.py", "OpenAgentsError"),  # what masks the secrets in an error of the original SDK's package
    }
    made = {
        (path.name, name)
        for path in LIBRARY.rglob("*.py")
        if path != Path(errors.__file__)
        for name in _called(ast.parse(path.read_text())) & names
    }
    assert made - not_raised == set()


def test_statuses_and_retries_fit_each_other() -> None:
    """A retryable error is temporary. An error that the caller has to correct is a 4xx."""
    for cls in DECLARED.values():
        passing = cls.http_status in (502, 503, 504)
        assert passing or not cls.retryable, cls
        assert (400 <= cls.http_status < 500) or not issubclass(cls, errors.UserError), cls
        assert cls.http_status == 500 or not issubclass(cls, errors.ConfigError | errors.PluginError), cls


def _called(tree: ast.Module) -> set[str]:
    """The names that are called anywhere in a module."""
    calls: Iterable[ast.Call] = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


# --- what provocations share -----------------------------------------------------------------------------


def raised(action: Callable[[], object]) -> OpenAgentsError:
    with pytest.raises(OpenAgentsError) as error:
        action()
    return error.value


def ended(handle: RunHandle[Any]) -> ErrorDetails:
    """The error with which a run ended; the error that `get` raises is the same."""
    details = handle.wait(PATIENCE_S).error_details
    assert details is not None
    failed = handle.get(propagate=False)
    assert (failed.code, failed.run_id) == (details.code, handle.id)
    return details


def hanging(shop: Installation, **fields: Any) -> RunHandle[Any]:
    """A run whose model does not answer; returns when the model was called."""
    shop.model.will_say({"error": "hang"})
    handle = shop.submit("clerk", **fields)
    wait_for(lambda: shop.model.asked(handle.id), "the model is asked", timeout=PATIENCE_S)
    return handle


def calling(shop: Installation, tool_call: dict[str, Any]) -> ErrorDetails:
    """How a run ends whose model asks for a tool that fails."""
    shop.model.will_say({"tool_calls": [tool_call]}, {"text": "never"})
    return ended(shop.submit("clerk", budget=NO_RETRY))


def loading(shop: Installation, definition: dict[str, Any]) -> OpenAgentsError:
    """The announcement of a worker about such an agent, before it consumes anything."""
    config = load_agents(json.dumps({"agents": [definition]}), env={"MODEL_URL": "http://127.0.0.1:1"})
    return raised(lambda: Assembly(config, env={}).parts("a").new_pattern())


def numbers(agent_id: str, these: list[int], **config: Any) -> dict[str, Any]:
    pattern = {"impl": f"{PLUGINS}.Numbers", "config": {"numbers": these, **config}}
    return harness.agent(agent_id, tools=[{"id": "echo", "impl": f"{PLUGINS}.echo"}], pattern=pattern)


def recovered(shop: Installation, run_id: str, times: int) -> bool:
    return shop.client.record(run_id).recoveries == times


def dies(hand: Hand, run_id: str) -> None:
    """A worker claims the run, and its heart stops beating."""
    alive, hand.incarnation = hand.incarnation, "dead:1"
    hand.store.run(scripts.register(incarnation="dead:1", lease_ms=60_000, agents=[]))
    hand.claim(run_id)
    hand.store.run(scripts.register(incarnation="dead:1", lease_ms=1, agents=[]))
    hand.incarnation = alive


@contextmanager
def answering(status: int) -> Generator[str]:
    """A server that answers every request with this status; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, name=f"answering {status}")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
