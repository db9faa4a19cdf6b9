"""Everything that can be known of an agent at start is checked at start."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openagents_worker.agents import load_agents, read_agents_file
from openagents_worker.diagnostics import BUILTIN_DIAGNOSTICS
from openagents_worker.diagnostics.base import DiagnosticsExporter
from openagents_worker.errors import AgentUnavailable, ConfigLoadError, ConfigValidationError, PluginLoadError
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.start_checks import find_problems, remarks
from openagents_worker.settings import Settings
from tests.tls.certificates import Certificates
from tests.unit import broken_plugins

BROKEN = "tests.unit.broken_plugins"
SECRET = "sk-not-to-be-shown-1234"
GOOD = {
    "id": "good",
    "name": "Good",
    "llm": {"provider": "mock"},
    "pattern": {"type": "react"},
    "memory": {"type": "buffer"},
}
OPENAI = {"provider": "openai_compatible", "api_base": "http://127.0.0.1:1/v1"}


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def agent(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def found(definition: dict[str, Any], env: dict[str, str] | None = None) -> list[tuple[str, str, str]]:
    """Path, code and the whole line of each problem of the only agent."""
    env = env or {}
    file = read_agents_file(json.dumps({"agents": [definition]}), env=env)
    told = [problem.to_dict() for problem in find_problems(file, env)]
    return [(each["path"], each["code"], f"{each['message']}; {each['hint']}") for each in told]


def tool(impl: str, **config: Any) -> dict[str, Any]:
    return agent(tools=[{"id": "t", "impl": f"{BROKEN}.{impl}", "config": config}])


MODEL = "agents[0].llm"
TOOL = "agents[0].tools[0]"


@pytest.mark.parametrize(
    ("definition", "path", "code", "says"),
    [
        (agent(llm={"provider": "opnai_compatible"}), f"{MODEL}.provider", "plugin.load", "did you mean"),
        (agent(llm={"provider": "mock", "seed": 1}), f"{MODEL}.seed", "plugin.config", "mock has no such"),
        (agent(llm=OPENAI | {"temprature": 1}), f"{MODEL}.temprature", "plugin.config", "'temperature'?"),
        (agent(llm=OPENAI | {"tpo_p": 1}), f"{MODEL}.tpo_p", "plugin.config", "did you mean 'top_p'?"),
        (agent(llm=OPENAI | {"top_p": 2}), f"{MODEL}.top_p", "plugin.config", "less than or equal to 1"),
        (agent(llm=OPENAI | {"api_key_env": "K"}), f"{MODEL}.api_key_env", "plugin.config", "K is not set"),
        (
            agent(llm={"provider": "openai_compatible"}),
            f"{MODEL}.api_key_env",
            "plugin.config",
            "OPENAI_API_KEY is not set",
        ),
        (agent(llm=OPENAI | {"api_base": "ftp://x"}), f"{MODEL}.api_base", "plugin.config", "not an http(s)"),
        (agent(llm=OPENAI | {"api_base": "http://"}), f"{MODEL}.api_base", "plugin.config", "not an http(s)"),
        (agent(llm=OPENAI | {"api_base": "localhost"}), f"{MODEL}.api_base", "plugin.config", "for example"),
        (
            agent(llm=OPENAI | {"stream_endpoint": "ws://x"}),
            f"{MODEL}.stream_endpoint",
            "plugin.config",
            "not an http(s)",
        ),
        (
            agent(llm=OPENAI | {"extra_headers": {"X Y": "a"}}),
            f"{MODEL}.extra_headers.X Y",
            "plugin.config",
            "not a valid name",
        ),
        (
            agent(llm=OPENAI | {"pricing": {"inputs": 1}}),
            f"{MODEL}.pricing.inputs",
            "config.validation",
            "did you mean 'input'?",
        ),
        (
            agent(llm=OPENAI | {"timeout_ms": 0}),
            f"{MODEL}.timeout_ms",
            "config.validation",
            "greater than or equal to 1",
        ),
        (
            agent(llm=OPENAI | {"timeout_ms": 2000, "total_timeout_ms": 1000}),
            f"{MODEL}.timeout_ms",
            "config.validation",
            "more than total_timeout_ms",
        ),
        (
            agent(llm={"provider": "scripted", "script": [{"text": "a"}, {"eror": 1}]}),
            f"{MODEL}.script[1]",
            "plugin.config",
            "neither 'text'",
        ),
        (agent(pattern={"type": "raect"}), "agents[0].pattern.type", "plugin.load", "did you mean 'react'?"),
        (
            agent(pattern={"type": "react", "config": {"max_step": 1}}),
            "agents[0].pattern.config.max_step",
            "plugin.config",
            "did you mean 'max_steps'?",
        ),
        (
            agent(memory={"type": "buffer", "config": {"max_items": 0}}),
            "agents[0].memory.config.max_items",
            "plugin.config",
            "greater than 0",
        ),
        (
            agent(context_assembler={"type": "head_tale"}),
            "agents[0].context_assembler.type",
            "plugin.load",
            "did you mean 'head_tail'?",
        ),
        (
            agent(context_assembler={"type": "sliding_window", "config": {"encoding": "no_such_encoding"}}),
            "agents[0].context_assembler.config",
            "plugin.config",
            "tokenizers",
        ),
        (
            agent(memory={"type": "chain", "config": {"memories": [{"type": "window_buffr"}]}}),
            "agents[0].memory.config.memories[0].type",
            "plugin.load",
            "did you mean 'window_buffer'?",
        ),
        (
            agent(memory={"type": "chain", "config": {"memories": []}}),
            "agents[0].memory.config.memories",
            "plugin.config",
            "at least 1",
        ),
        (
            agent(tools=[{"id": "r", "type": "remember_preference"}]),
            f"{TOOL}",
            "config.validation",
            "markdown_memory",
        ),
        (agent(tools=[{"id": "t", "type": "clac"}]), f"{TOOL}.type", "plugin.load", "did you mean 'calc'?"),
        (agent(tools=[{"id": "t", "impl": "no.such.Thing"}]), f"{TOOL}.impl", "plugin.load", "No module"),
        (
            agent(tools=[{"id": "t", "impl": "tests.unit.broken_module.T"}]),
            f"{TOOL}.impl",
            "plugin.load",
            "its module raised RuntimeError: no settings module",
        ),
        (
            agent(llm=OPENAI | {"api_key_file": "/no/such"}),
            f"{MODEL}.api_key_file",
            "plugin.config",
            "/no/such cannot be read: No such file",
        ),
        (
            agent(llm=OPENAI | {"api_key_file": "/"}),
            f"{MODEL}.api_key_file",
            "plugin.config",
            "/ is not a file",
        ),
        (
            agent(llm=OPENAI | {"api_key_file": "/dev/null"}),
            f"{MODEL}.api_key_file",
            "plugin.config",
            "/dev/null is not a file",
        ),
        (
            agent(llm=OPENAI | {"api_key_file": "/etc/hostname", "api_key_env": "K"}),
            f"{MODEL}.api_key_file",
            "plugin.config",
            "api_key_env is set too; remove one of them",
        ),
        (
            agent(llm=OPENAI | {"fallbacks": [{"api_key_file": "/no/such"}]}),
            f"{MODEL}.fallbacks[0].api_key_file",
            "plugin.config",
            "/no/such cannot be read",
        ),
        (
            agent(llm={"provider": "litellm", "model": "openai/gpt-4o"}),
            f"{MODEL}.provider",
            "plugin.config",
            "LiteLLM is not installed; pip install 'openagents-worker[litellm]'",
        ),
        (agent(llm=OPENAI | {"proxy": "socks4://h:1"}), f"{MODEL}.proxy", "plugin.config", "unknown scheme"),
        (agent(llm=OPENAI | {"proxy": "h:3128"}), f"{MODEL}.proxy", "plugin.config", "has no scheme"),
        (agent(llm=OPENAI | {"proxy": "http://"}), f"{MODEL}.proxy", "plugin.config", "is not a URL"),
        (agent(llm=OPENAI | {"ca_file": "/no/such"}), f"{MODEL}.ca_file", "plugin.config", "No such file"),
        (
            agent(llm=OPENAI | {"ca_file": __file__}),
            f"{MODEL}.ca_file",
            "plugin.config",
            "contains no PEM certificate",
        ),
        (
            agent(llm=OPENAI | {"client_cert": "/no/such"}),
            f"{MODEL}.client_cert",
            "plugin.config",
            "No such file",
        ),
        (
            agent(llm=OPENAI | {"client_key": "/no/such"}),
            f"{MODEL}.client_key",
            "plugin.config",
            "there is no client_cert",
        ),
        (
            agent(llm=OPENAI | {"client_cert": __file__, "client_key_password_env": "P"}),
            f"{MODEL}.client_key_password_env",
            "plugin.config",
            "P is not set",
        ),
        (tool("Missing"), f"{TOOL}.impl", "plugin.load", "has no attribute 'Missing'"),
        (tool("A_TEXT"), f"{TOOL}.impl", "plugin.load", "not a class or a function: it is a str"),
        (tool("NoTool"), f"{TOOL}.impl", "plugin.load", "is not a tool: it has no invoke"),
        (tool("RaisesWhenMade"), f"{TOOL}.impl", "plugin.load", "created: RuntimeError: no licence"),
        (tool("TakesNoConfig"), f"{TOOL}.impl", "plugin.load", "it is called with config={…}"),
        (tool("NoSchema"), f"{TOOL}.config", "plugin.config", "not a supported JSON Schema"),
        (tool("CannotDescribe"), f"{TOOL}.impl", "plugin.load", "speechless"),
        (tool("Picky", size=0), f"{TOOL}.config.size", "plugin.config", "greater than or equal to 1"),
        (tool("Picky", size=1, color="x"), f"{TOOL}.config.color", "plugin.config", "did you mean 'colour'?"),
        (tool("LargeSchema"), f"{TOOL}.config", "plugin.config", "65,536 are allowed"),
        (
            agent(pattern={"impl": f"{BROKEN}.TakesNoLimits"}, runtime={"step_timeout_ms": 5}),
            "agents[0].pattern.impl",
            "plugin.load",
            "a step cannot be timed",
        ),
        (tool("OwnModel", size="x"), f"{TOOL}.config.size", "plugin.config", "valid integer"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_found_with_its_path_code_and_hint(
    definition: dict[str, Any], path: str, code: str, says: str
) -> None:
    """One problem for one mistake, at the place that has to be changed."""
    [(found_path, found_code, line)] = found(definition)

    assert (found_path, found_code) == (path, code)
    assert says in line


NO_PLUGINS = (
    "builtins.exec", "builtins.eval", "builtins.print", "builtins.open", "builtins.breakpoint",
    "builtins.dict", "os.system", "os.remove", "os._exit", "os.abort", "sys.exit", "subprocess.run",
    "subprocess.Popen", "subprocess.call", "shutil.rmtree", "logging.config.dictConfig", "pathlib.Path",
    "ctypes.CDLL", "runpy.run_module", "signal.raise_signal", "pickle.loads", "json.loads", "asyncio.run",
    "time.sleep", "tests.unit.broken_plugins.drop_all",
    "tests.unit.broken_plugins.drop_all_soon",
    "tests.unit.broken_plugins.DropsAll", "tests.unit.broken_plugins.CALLED.append",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["tool", "pattern", "memory", "context_assembler"])
@pytest.mark.parametrize("impl", NO_PLUGINS)
def test_what_is_not_a_plugin_is_not_called(impl: str, kind: str) -> None:
    """A class without the methods of its kind, a function of Python, one that takes no config."""
    part = {"impl": impl, "config": {"x": 1}}
    definition = agent(tools=[{"id": "t", **part}]) if kind == "tool" else agent(**{kind: part})

    [(path, code, line)] = found(definition)

    assert code == "plugin.load"
    assert path == (f"{TOOL}.impl" if kind == "tool" else f"agents[0].{kind}.impl")
    assert impl in line
    assert broken_plugins.CALLED == []


def test_a_tool_that_is_not_enabled_is_not_looked_at() -> None:
    """Nobody can call it."""
    tools = [{"id": "t", "impl": "no.such.Thing", "enabled": False}]
    assert found(agent(tools=tools)) == []


def test_several_problems_of_one_part_are_all_told() -> None:
    """Of a model, of a plugin's config, and of the parts beside them."""
    llm = OPENAI | {"api_base": "x", "temprature": 1, "api_key_env": "K", "extra_headers": {"A": "\n"}}
    pattern = {"type": "react", "config": {"max_steps": 0, "system_promt": ""}}

    paths = [path for path, _, _ in found(agent(llm=llm, pattern=pattern))]

    assert sorted(paths) == [
        "agents[0].llm.api_base",
        "agents[0].llm.api_key_env",
        "agents[0].llm.extra_headers.A",
        "agents[0].llm.temprature",
        "agents[0].pattern.config.max_steps",
        "agents[0].pattern.config.system_promt",
    ]


def test_what_is_wrong_in_one_part_hides_nothing_in_the_others() -> None:
    """Within an agent, and in the defaults of all; what follows from a missing variable is not told."""
    definition = agent(
        nmae="A", memory={"type": "bufer"}, pattern={"type": "${NONE}"}, tools=[{"id": "t", "type": "clac"}]
    )
    sections = {"runtime": {"config": {"context_assembler": {"type": "trunc"}}}, "agnts": []}
    file = read_agents_file(json.dumps({"agents": [definition], **sections}), env={})

    assert sorted(problem.to_dict()["path"] for problem in find_problems(file, {})) == [
        "agents[0].memory.type",
        "agents[0].nmae",
        "agents[0].pattern.type",
        "agents[0].tools[0].type",
        "agnts",
        "runtime.config.context_assembler.type",
    ]


def test_no_problem_shows_the_value_of_a_variable() -> None:
    """Also where a plugin quotes its config in its error."""
    definition = agent(
        llm=OPENAI | {"api_base": "${KEY}"},
        tools=[{"id": "t", "impl": f"{BROKEN}.Picky", "config": {"size": "${KEY}"}}],
        memory={"type": "${KEY}"},
    )

    told = found(definition, {"KEY": SECRET})

    assert len(told) == 3
    assert SECRET not in str(told)


def test_a_server_of_ones_own_needs_no_key() -> None:
    """Ollama and vLLM have none; OpenAI's key may also stand in a header."""
    assert found(agent(llm=OPENAI)) == []
    assert (
        found(agent(llm={"provider": "openai_compatible"}), {"OPENAI_BASE_URL": "http://127.0.0.1:1"}) == []
    )
    header = {"Authorization": "${KEY}"}
    assert found(agent(llm={"provider": "openai_compatible", "extra_headers": header}), {"KEY": SECRET}) == []


def test_a_key_that_everybody_can_read_is_remarked(tmp_path: Path) -> None:
    """Also that of a fallback. It is no mistake: a secret that Kubernetes mounts has this mode by default."""
    own, other, hidden = (tmp_path / name for name in ("own", "other", "hidden"))
    for key, mode in ((own, 0o644), (other, 0o604), (hidden, 0o640)):
        key.write_text("key")
        key.chmod(mode)
    llm = OPENAI | {"api_key_file": str(own), "fallbacks": [{"api_key_file": str(other)}]}
    definitions = [agent(llm=llm), agent(id="b", llm=OPENAI | {"api_key_file": str(hidden)})]
    file = read_agents_file(json.dumps({"agents": definitions}), env={})

    assert find_problems(file, {}) == []
    assert file.config is not None
    assert [remark.partition(", which")[0] for remark in remarks(file.config)] == [
        f"agent 'good': every user of this machine can read {path}" for path in (own, other)
    ]


def test_a_certificate_that_cannot_be_used_is_found_at_start(tmp_path: Path) -> None:
    """Without its key, with another key, with a password that is missing, or not of an authority."""
    made = Certificates.made(tmp_path)
    other = made.ca.issue_cert("other@example.org")
    other.private_key_pem.write_to_path(tmp_path / "other.key")
    cert, encrypted = str(tmp_path / "client.crt"), str(tmp_path / "client-encrypted.key")

    def problem(**options: str) -> str:
        [(path, _, line)] = found(agent(llm=OPENAI | options), {"PASSWORD": "another one"})
        assert path == f"{MODEL}.{next(iter(options))}"
        return line

    assert "no private key in the file of client_cert, and client_key is not set" in problem(client_cert=cert)
    assert "no private key in the file of client_key" in problem(client_cert=cert, client_key=cert)
    assert "do not belong together" in problem(client_cert=cert, client_key=str(tmp_path / "other.key"))
    assert "set client_key_password_env" in problem(client_cert=cert, client_key=encrypted)
    wrong = {"client_key": encrypted, "client_key_password_env": "PASSWORD"}
    assert "a password, which does not fit" in problem(client_cert=cert, **wrong)
    assert "is not a PEM certificate" in problem(client_cert=str(tmp_path / "client.key"))
    assert "no certificate of an authority" in problem(ca_file=cert)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    ("proxy", "says"),
    [
        ("socks5://127.0.0.1:1080", "requires a package that is not installed; pip install socksio"),
        ("socks4://127.0.0.1:1080", "unknown scheme 'socks4'"),
        ("http://proxy:none", "is not a URL"),
        ("http://", "is not a URL"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_found_at_start(
    variable: str, proxy: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the variable that names it, and without what else stands in it."""
    monkeypatch.setenv(variable, proxy)

    [(path, code, line)] = found(agent(llm=OPENAI | {"api_base": "http://model.example.com/v1"}))

    assert (path, code) == ("agents[0].llm.api_base", "plugin.config")
    assert f"{variable.upper()}" in line
    assert says in line


def test_a_proxy_that_is_not_used_for_the_model_is_none_of_its_business(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NO_PROXY names the model's host, or the proxy is for the other scheme; a proxy may have no scheme."""
    llm = OPENAI | {"api_base": "http://model.example.com/v1"}
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1080")
    assert found(agent(llm=llm)) == []
    monkeypatch.setenv("HTTP_PROXY", "127.0.0.1:3128")
    assert found(agent(llm=llm)) == []
    monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:1080")
    monkeypatch.setenv("NO_PROXY", "model.example.com")
    assert found(agent(llm=llm)) == []


# --- a worker's start ------------------------------------------------------------------------------------


def start(path: Path, *agents: Any, env: dict[str, str] | None = None, **sections: Any) -> Assembly:
    file = path / "agents.json"
    file.write_text(json.dumps({"agents": list(agents), **sections}))
    return Assembly.from_settings(Settings(config=str(file)), env or {})


def test_a_worker_serves_the_agents_that_it_can_serve(tmp_path: Path) -> None:
    """It announces no other, and knows why not."""
    keyless = agent(id="keyless", llm=OPENAI | {"api_key_env": "K"})
    misspelt = agent(id="misspelt", patern={})
    assembly = start(tmp_path, keyless, GOOD, misspelt)

    assert assembly.announcements()[0::2] == ["good"]
    assert set(assembly.unavailable) == {"keyless", "misspelt"}
    with pytest.raises(AgentUnavailable, match=r"line 1: agents\[0\]\.llm\.api_key_env: .* K is not set"):
        assembly.parts("keyless")


def test_the_key_makes_the_agent_available(tmp_path: Path) -> None:
    """A restart with another environment is enough."""
    keyless = agent(id="keyless", llm=OPENAI | {"api_key_env": "K"})
    assembly = start(tmp_path, keyless, env={"K": SECRET})

    assert assembly.announcements()[0::2] == ["keyless"]


@pytest.mark.parametrize(
    ("agents", "sections"),
    [
        ([agent(llm=OPENAI | {"api_key_env": "K"}), agent(id="b", memory={"type": "none"})], {}),
        ([GOOD, GOOD], {}),
        ([GOOD, agent(id=5)], {}),
        ([GOOD, "x"], {}),
        ([GOOD], {"loging": {}}),
        ([GOOD], {"logging": {"level": "${LEVEL}"}}),
    ],
)
def test_a_worker_that_can_serve_nobody_or_cannot_know_whom_does_not_start(
    tmp_path: Path, agents: list[Any], sections: dict[str, Any]
) -> None:
    """It refuses with everything that is wrong."""
    with pytest.raises(ConfigValidationError) as caught:
        start(tmp_path, *agents, **sections)

    assert caught.value.problems
    assert caught.value.file == str(tmp_path / "agents.json")


def test_a_file_that_cannot_be_parsed_is_refused(tmp_path: Path) -> None:
    """Nothing is known of its agents."""
    (tmp_path / "agents.json").write_text("{")
    with pytest.raises(ConfigLoadError):
        Assembly.from_settings(Settings(config=str(tmp_path / "agents.json")), {})


def test_all_modules_of_plugins_that_cannot_be_imported_are_named(tmp_path: Path) -> None:
    """Not one a start."""
    (tmp_path / "agents.json").write_text(json.dumps({"agents": [GOOD]}))
    settings = Settings(config=str(tmp_path / "agents.json"), imports=("no.such.one", "no.such.two"))
    with pytest.raises(PluginLoadError, match=r"no\.such\.one.*no\.such\.two"):
        Assembly.from_settings(settings, {})


# --- what a definition is --------------------------------------------------------------------------------


def test_the_hash_covers_what_the_file_says_and_not_the_defaults() -> None:
    """A version with other defaults, or with more options, has the same hash for the same file."""

    def hash_of(**changes: Any) -> str:
        return load_agents(json.dumps({"agents": [agent(**changes)]}), env={}).agents[0].definition_hash

    written = json.dumps(GOOD, sort_keys=True, separators=(",", ":"))
    assert hash_of() == hashlib.sha256(written.encode()).hexdigest()
    assert hash_of(runtime={"max_steps": 16}) != hash_of(), "what is written counts, also a default"
    assert hash_of(runtime={"max_steps": "16"}) == hash_of(runtime={"max_steps": 16})


# --- anything may stand in a file ------------------------------------------------------------------------

WHOLE = {
    "version": "1.0",
    "agents": [
        agent(id="one", tools=[{"id": "calc", "type": "calc"}], limits={"max_steps": 3}, queue="q"),
        agent(id="two", llm=OPENAI | {"retry": {"max_attempts": 2}, "pricing": {"input": 1}}),
    ],
    "runtime": {"type": "default", "config": {"context_assembler": {"type": "truncating"}}},
    "logging": {"level": "INFO", "per_logger_levels": {"a": "DEBUG"}},
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "a", "${X}", "${X:-1}", "react"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["id", "type", "impl", "config", "agents"]), inner, max_size=2)
    ),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


@settings(deadline=None)
@given(st.data())
def test_whatever_stands_in_a_file_it_is_read_or_refused_with_lines(data: st.DataObject) -> None:
    """No file makes the reader fail: some parts of a right one are replaced by anything."""
    document = json.loads(json.dumps({"": WHOLE}))
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(_places(document)[1:]))
        part = document
        for key in path:
            part = part[key]
        part[last] = data.draw(ANYTHING)
    assume(isinstance(document[""], dict))  # else it is taken for a path
    text = json.dumps(document[""], indent=1)

    file = read_agents_file(text, env={})
    found = find_problems(file, {})

    assert all(problem.line is not None and problem.line <= text.count("\n") + 1 for problem in found)
    assert (file.config is None) <= bool(found)
    if file.config is not None:
        wrong = {file.agent_id(problem) for problem in file.problems}
        assert not wrong & {agent.id for agent in file.config.agents}


@pytest.mark.parametrize(
    ("diagnostics", "path", "says"),
    [
        (
            {"type": "langfus"},
            "diagnostics.type",
            "did you mean 'langfuse'?",
        ),
        ({"impl": f"{BROKEN}.Nothing"}, "diagnostics.impl", "cannot load diagnostics"),
        ({"impl": "tests.unit.test_start_checks.Sender"}, "diagnostics.config.url", "required"),
        ({"impl": "pathlib.Path"}, "diagnostics.impl", "it has no export"),
        ({"type": "null"}, "", ""),
        ({"type": None}, "", ""),
    ],
)
def test_an_exporter_is_checked_at_start(diagnostics: dict[str, Any], path: str, says: str) -> None:
    """Its reports would otherwise be missed when they are needed."""
    file = read_agents_file(json.dumps({"agents": [GOOD], "diagnostics": diagnostics}), env={})
    problems = [each.to_dict() for each in find_problems(file, {})]

    assert [each["path"] for each in problems] == ([path] if path else [])
    assert all(says in f"{each['message']}; {each['hint']}" for each in problems)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("langfuse", "otlp", "opentelemetry.exporter"),
        ("phoenix", "otlp", "opentelemetry.exporter"),
        ("rich", "console", "rich"),
    ],
)
def test_an_exporter_that_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    """Not an ImportError in the middle of a start."""
    for each in (name, module):
        monkeypatch.delitem(sys.modules, f"openagents_worker.diagnostics.{each}", raising=False)
    for each in (package, *(known for known in sys.modules if known.startswith(f"{package}."))):
        monkeypatch.setitem(sys.modules, each, None)
    monkeypatch.setattr(BUILTIN_DIAGNOSTICS, "_imported", {})
    file = read_agents_file(json.dumps({"agents": [GOOD], "diagnostics": {"type": name}}), env={})

    (problem,) = find_problems(file, {})

    assert (problem.path, problem.code) == (("diagnostics", "type"), "plugin.load")
    assert problem.message.startswith(f"diagnostics {name!r} needs the package {package}")
    assert problem.hint == f"pip install 'openagents-worker[{name}]'"


class Sender(DiagnosticsExporter):
    class Config(DiagnosticsExporter.Config):
        url: str
