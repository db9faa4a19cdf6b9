"""Secrets and control sequences: sent through every entry point, then searched for in every output."""

from __future__ import annotations

import json
import pickle
import re
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from openagents_worker.agents import load_agents
from openagents_worker.cli.commands import commands, run
from openagents_worker.errors import AgentNotFoundError, ConfigValidationError, OpenAgentsError, RunFailed
from openagents_worker.printable import printable
from openagents_worker.producer.handle import RunHandle
from openagents_worker.secret_forms import MASK
from openagents_worker.settings import load_settings
from tests.hostile.matrix import SECRETS as SECRETS_KIND
from tests.hostile.planted import CONTROL, KEYS, SECRETS, WAYS, Secret
from tests.hostile.planting import Planting, planting_in
from tests.hostile.table import Attack, Case, cases, hostile
from tests.hostile.world import World
from tests.support.deployment import PATIENCE_S, call
from tests.support.waiting import wait_for

NEEDLES = {form for secret in SECRETS for form in (secret.needle, json.dumps(secret.needle)[1:-1])}
ANY_NEEDLE = re.compile("|".join(map(re.escape, sorted(NEEDLES))))
EVERY_WAY = [(number, list(WAYS)[number % len(WAYS)]) for number in range(len(SECRETS))]
ids = [secret.name for secret in SECRETS]
SHOWN = 4  # each fourth run is looked at as its producer sees it; what is stored of it is looked at of all


@pytest.fixture(scope="module")
def planting(tmp_path_factory: pytest.TempPathFactory) -> Generator[Planting]:
    with planting_in(tmp_path_factory.mktemp("planted")) as planting:
        yield planting


Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `openagents-worker` with these arguments in this process, and return its output."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["openagents-worker", *arguments])
        with pytest.raises(SystemExit):
            run()
        shown = capsys.readouterr()
        return shown.out + shown.err

    return call


def leaks(texts: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """The needles that were found, each with its source and the surrounding text."""
    found = []
    for where, text in texts:
        for leaked in ANY_NEEDLE.finditer(text):
            found.append((where, leaked[0], text[max(0, leaked.start() - 60) : leaked.end() + 20]))
    return found


def shown_of(handle: RunHandle[Any]) -> Iterator[tuple[str, str]]:
    """A run as its producer gets it: the result, and the error of `get` as text, pickle and traceback."""
    result = handle.wait(PATIENCE_S)
    yield "result", f"{result!r} {result} {result.model_dump_json()}"
    yield "record", repr(handle.record())
    yield "handle", f"{handle!r} {[event.to_json() for event in handle.events()]}"
    try:
        handle.get(PATIENCE_S)
    except RunFailed as error:
        notes = " ".join(error.__notes__) if hasattr(error, "__notes__") else ""
        yield "RunFailed", f"{error!r} {error} {error.result} {error.hint} {notes} {error.to_dict()}"
        yield "pickle", pickle.dumps(error).decode("utf-8", "replace")
        yield "traceback", "".join(traceback.format_exception(error))


def of_commands(planting: Planting, handle: RunHandle[Any]) -> Iterator[tuple[str, str]]:
    """The output of every reading command about a run, as text and as JSON."""
    env = {"OPENAGENTS_REDIS_URL": planting.stack.redis_url}
    session_id = handle.record().session_id
    reading = (["show", handle.id], ["watch", handle.id], ["runs"], ["sessions"], ["session", session_id],
               ["workers"], ["status"])  # fmt: skip
    for arguments in reading:
        for more in ([], ["--json"]):
            done = CliRunner().invoke(commands, [*arguments, *more], env=env)
            assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
            assert done.output, arguments
            yield " ".join([*arguments, *more]), done.output


# --- secrets ---------------------------------------------------------------------------------------------


def test_a_secret_in_a_tools_exception_is_in_no_output(planting: Planting) -> None:
    """Not the model, a key, a channel, a log, a command or the producer. The error itself is reported."""
    seen, ways = [], list(WAYS)
    for some in (ways[:4], ways[4:]):  # a run may call 200 tools
        turns = [[call("leak", number=number, way=way) for number in range(len(SECRETS))] for way in some]
        planting.model.will_say(*({"tool_calls": leaky} for leaky in turns), {"text": "fine"})

        (handle,) = planting.ended([planting.submit("clerk")])

        messages = planting.model.asked(handle.id)[-1]["messages"]
        told = [message["content"] for message in messages if message["role"] == "tool"]
        assert len(told) == len(SECRETS) * len(some)
        assert all('"error"' in content for content in told)
        for number, way in enumerate(some):
            of_way = told[number * len(SECRETS) :][: len(SECRETS)]
            assert MASK in str(of_way) or way in ("noted", "caused")
        seen += [*shown_of(handle), *of_commands(planting, handle)]
    assert leaks([*seen, *planting.everything()]) == []


@pytest.mark.long
@pytest.mark.parametrize("agent_id", ["pattern", "memory"])
def test_a_secret_in_a_plugins_exception_is_in_no_output(planting: Planting, agent_id: str) -> None:
    handles = planting.ended(planting.submit(agent_id, f"{number} {way}") for number, way in EVERY_WAY)

    assert all(handle.wait(PATIENCE_S).error_details is not None for handle in handles)
    if agent_id == "memory":
        assert all("memory.inject_failed" in [event.name for event in handle.events()] for handle in handles)
    seen = [line for handle in handles[::SHOWN] for line in shown_of(handle)]
    assert leaks([*seen, *of_commands(planting, handles[0]), *planting.everything()]) == []


@pytest.mark.long
def test_a_secret_in_a_providers_error_is_in_no_output(planting: Planting) -> None:
    handles = []
    for secret in SECRETS:
        planting.model.will_say({"error": "response", "message": f"refused: {secret.text}", "status": 401})
        handles += planting.ended([planting.submit("clerk")])

    assert {handle.record().reason_code for handle in handles} == {"llm.auth"}
    seen = [line for handle in handles[::SHOWN] for line in shown_of(handle)]
    assert leaks([*seen, *of_commands(planting, handles[0]), *planting.everything()]) == []


@pytest.mark.long
def test_the_deployments_own_key_is_masked_where_a_tool_shows_it(planting: Planting) -> None:
    """Its value is known from the variable that the agents file names, so it is masked whatever its form."""
    planting.model.will_say({"tool_calls": [call("own_key")]}, {"text": "fine"})

    (handle,) = planting.ended([planting.submit("clerk")])

    told = planting.model.asked(handle.id)[-1]["messages"][-1]["content"]
    assert f"refused with {MASK}" in told
    assert leaks([*shown_of(handle), *planting.everything()]) == []


@pytest.mark.long
def test_a_models_key_is_in_no_output_wherever_it_comes_from(planting: Planting) -> None:
    """From a variable, a file, or a registered function. The provider repeats it in its errors, and the
    function in its exception."""
    agents = ("clerk", "filed", "tenanted")
    handles = []
    for agent_id, key in zip(agents, KEYS, strict=True):
        planting.model.will_say({"error": "response", "message": f"not {key}", "status": 401})
        handles += planting.ended([planting.submit(agent_id, tenant="acme")])
        planting.model.will_say({"text": "fine"})
        handles += planting.ended([planting.submit(agent_id, tenant="acme")])
    handles += planting.ended([planting.submit("tenanted", tenant="nobody")])

    codes = [handle.record().reason_code for handle in handles]
    assert codes == ["llm.auth", None] * len(agents) + ["llm.connection"]
    seen = [line for handle in handles for line in (*shown_of(handle), *of_commands(planting, handle))]
    found = [(where, text) for where, text in (*seen, *planting.everything()) if any(k in text for k in KEYS)]
    assert found == []
    assert any("every user of this machine can read" in line for line in planting.log)


@pytest.mark.long
def test_a_secret_in_a_reason_is_in_no_output(planting: Planting) -> None:
    """In the reason of a cancellation or a resume. Only workers know the last secret."""
    secrets = SECRETS[:-1]
    planting.model.will_say({"text": "fine"})
    planting.model.may_answer = lambda run_id: False
    try:
        handles = [planting.submit("clerk") for _ in secrets]
        for handle, secret in zip(handles, secrets, strict=True):
            handle.cancel(f"because {secret.text}")
        planting.ended(handles)
    finally:
        planting.model.may_answer = lambda run_id: True
    for handle, secret in zip(handles, secrets, strict=True):
        planting.client.resume(handle.id, by=f"ann, {secret.text}")
    planting.ended(handles)

    told = [event.payload for event in handles[0].events() if event.name == "run.cancelled"]
    assert str(told[0]["reason"]).startswith("because sk-")
    seen = [line for handle in handles[::SHOWN] for line in shown_of(handle)]
    assert leaks([*seen, *of_commands(planting, handles[0]), *planting.everything()]) == []


URLS = [secret for secret in SECRETS if "://" in secret.text and "@" in secret.text]
WRONG_URLS = {
    "quoted": "'redis://:hunter2-x@host:6379/0'",
    "a slash in the password": "redis://:hunter2/x@host:6379/0",
    "a hash in the password": "redis://:hunter2#x@host:6379/0",
    "a question mark in the password": "redis://:hunter2?x@host:6379/0",
    "a blank in the password": "redis://:hunter2 x@host:6379/0",
    "an at in the password": "redis://:hunter2@x@host:6379/zero",
    "no scheme": ":hunter2-x@host:6379/0",
    "half a scheme": "redis:/:hunter2-x@host",
    "a port that is none": "redis://:hunter2-x@host:port/0",
    "an option that is none": "redis://:hunter2-x@host:6379/0?colour=hunter2-y",
    "a password as an option": "redis://host:6379/0?password=hunter2-x&db=zero",
    "of sentinels": "sentinel://:hunter2-x@host:26379/0?sentinel_password=hunter2-y",
    "another broker": "amqp://guest:hunter2/x@host//",
    "a result backend": "db+postgresql://ann:hunter2/x@host/db",
}


@pytest.mark.parametrize("url", WRONG_URLS.values(), ids=WRONG_URLS.keys())
@pytest.mark.parametrize(
    "variable", ["OPENAGENTS_REDIS_URL", "OPENAGENTS_BROKER_URL", "OPENAGENTS_RESULT_BACKEND"]
)
def test_a_url_in_the_settings_shows_no_password(variable: str, url: str) -> None:
    """For valid and invalid URLs: neither in the error nor in the printed settings."""
    try:
        settings = load_settings({variable: url})
        shown = f"{settings!r} {settings} {settings.redis_url_safe}"
    except ConfigValidationError as error:
        shown = f"{error!r} {error} {error.to_dict()} {''.join(traceback.format_exception(error))}"

    assert "hunter2" not in shown


@pytest.mark.parametrize("secret", SECRETS[:-1], ids=ids[:-1])
def test_a_secret_in_an_agents_file_is_not_in_its_errors(secret: Secret) -> None:
    """As a value of the wrong type, under an unknown key, or in a URL."""
    llm = {"provider": "mock", "temperature": secret.text, "api_base": 7, "password": secret.text}
    text = json.dumps({"agents": [{"id": secret.text, "llm": llm, "queue": ["x"], "api_key": secret.text}]})

    with pytest.raises(OpenAgentsError) as caught:
        load_agents(text)

    error = caught.value
    shown = f"{error!r} {error} {error.to_dict()} {''.join(traceback.format_exception(error))}"
    assert leaks([("error", shown)]) == []


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_what_a_module_raises_is_masked_where_the_file_is_checked(
    command: Command, tmp_path: Path, as_json: list[str]
) -> None:
    """`validate` masks it, and still reports that the module cannot be imported."""
    one = {"id": "a", "name": "a", "llm": {"provider": "mock"}, "memory": {"type": "buffer"}}
    file = tmp_path / "agents.json"
    file.write_text(json.dumps({"agents": [{**one, "pattern": {"impl": "tests.hostile.exploding.Pattern"}}]}))

    said = command("validate", str(file), *as_json)

    assert "RuntimeError" in said
    assert leaks([("validate", said)]) == []
    assert printable(said) == said


def test_an_unknown_agent_is_told_nothing_of_the_others(planting: Planting) -> None:
    """Only a similar name is suggested. An operator's command lists all agents."""
    for misspelt, near in (("clrk", "clerk"), ("wholly-other", None)):
        with pytest.raises(AgentNotFoundError) as caught:
            planting.submit(misspelt)

        assert [name for name in ("clerk", "pattern", "memory") if f"'{name}'" in str(caught.value)] == (
            [near] if near else []
        )


# --- control sequences -----------------------------------------------------------------------------------


def test_no_control_sequence_of_a_run_reaches_a_terminal(planting: Planting) -> None:
    """In a tool's result, an event, an artifact or an answer: every command escapes it."""
    texts = list(CONTROL.values())
    planting.model.will_say(
        {"tool_calls": [call("control", number=number) for number in range(len(texts))]},
        {"tool_calls": [call(f"no such {text}") for text in texts]},
        {"text": " ".join(texts)},
    )

    (handle,) = planting.ended([planting.submit("clerk", f"Go {' '.join(texts)}")])

    assert handle.wait(PATIENCE_S).final_output == " ".join(texts)
    for command, output in of_commands(planting, handle):
        assert printable(output) == output, command


def test_no_control_sequence_reaches_a_terminal_in_pieces(planting: Planting) -> None:
    """A reply that is streamed to a terminal, split at any position."""
    text = " ".join(CONTROL.values())
    planting.model.will_say({"text": text})
    env = {
        "OPENAGENTS_REDIS_URL": planting.stack.redis_url,
        "OPENAGENTS_BROKER_URL": planting.stack.redis_url,
    }

    for more in ([], ["--json"]):
        done = CliRunner().invoke(commands, ["run", "clerk", text, *more], env=env)

        assert done.exit_code == 0, done.output
        assert printable(done.output) == done.output


def test_no_log_line_holds_a_control_sequence(planting: Planting) -> None:
    """Neither in JSON nor in text logs, after all cases above."""
    planting.model.will_say(
        {"tool_calls": [call(f"no such {text}") for text in CONTROL.values()]}, {"text": "fine"}
    )
    before = len(planting.log)
    planting.ended(planting.submit("clerk") for _ in range(4))
    wait_for(lambda: len(planting.log) > before, "the workers have logged")

    assert [line for line in planting.log if printable(line) != line] == []
    assert any(line.startswith("{") for line in planting.log)


# --- through the shared entry points ---------------------------------------------------------------------


COMMANDS = ("show", "cancel", "session", "watch", "run", "validate", "runs --agent")
ENDED = ("exit 0", "exit 1", "exit 2 run.not_found", "exit 3 run.not_found", "exit 2 session.not_found",
         "exit 2 config.load", "exit 2 user.agent_not_found", "exit 2 request.invalid",
         "exit 2 config.validation",
         "exit 3 request.invalid")  # fmt: skip


def _entry_point_cases() -> list[Case]:
    def reply(text: str) -> bytes:
        return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()

    def stream(text: str) -> bytes:
        chunks = [{"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in text]
        chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return "".join([*lines, "data: [DONE]\n\n"]).encode()

    def broken(text: str) -> bytes:
        return json.dumps({"error": {"message": text, "type": "invalid_request_error"}}).encode()

    found = []
    for name, text in CONTROL.items():
        found += cases("reply", {name: (reply(text), "completed")})
        found += cases("stream", {name: (stream(text), "completed")})
        found += cases("tool_error", {name: (f"Anything({text!r})", "tool.error")})
        found += cases("agents_file", {name: ({"id": text}, ("config.validation", "loaded"))})
    for number, (name, text) in enumerate(CONTROL.items()):
        for command, as_json in ((COMMANDS[number % 7], []), (COMMANDS[(number + 3) % 7], ["--json"])):
            arguments = [*command.split(), text, *(["Go."] if command == "run" else []), *as_json]
            found += cases("cli", {f"{command} {name}": (arguments, ENDED)})
    for secret in SECRETS[::2]:
        found += cases("reply", {f"error, {secret.name}": (broken(secret.text), "llm.response")})
        header = {"x-echo": secret.text.replace("\n", " ")}
        found += cases("header", {secret.name: (header, "completed")})
    return found


@hostile(SECRETS_KIND, _entry_point_cases())
def test_the_worker_goes_on(case: Case, attack: Attack, world: World) -> None:
    """And no command prints a control sequence from its arguments."""
    attack(case)

    assert [text for text in world.printed if printable(text) != text] == []
