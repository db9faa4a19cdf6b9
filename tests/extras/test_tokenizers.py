"""tiktoken: its own package, as it is installed today, with a table of our own and without network."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.support.deployment import ROOT
from tests.support.runner import agent

pytestmark = pytest.mark.extras

TABLE = '''
def ours():
    """Every byte is a token, and so are two words."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in (b"he", b"hel", b"hell", b"hello", b" w", b" wo", b" wor", b" worl", b" world"):
        ranks[word] = len(ranks)
    special = {"<|end|>": 999}
    pattern = r" ?\\w+|\\s+|."
    return {"name": "ours", "special_tokens": special, "pat_str": pattern, "mergeable_ranks": ranks}


ENCODING_CONSTRUCTORS = {"ours": ours}
'''
PROGRAM = """
import json, sys
from openagents_worker.agents import AppConfig
from openagents_worker.context.tokens import token_counter
from openagents_worker.runtime.assembly import Assembly

assembly = Assembly(AppConfig.model_validate({"agents": json.loads(sys.argv[1])}), env={})
loaded = sorted(assembly.counters)
counters = {id_: assembly.parts(id_).assembler.counter for id_ in loaded}
print(json.dumps({
    "names": {id_: counter.name for id_, counter in counters.items()},
    "counts": list(map(counters["ours"].count, ("hello world", "<|end|>", "hello " * 2_000, "\\U0001f600"))),
}))
"""


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with everything that this one has, tiktoken, and our table."""
    folder = tmp_path_factory.mktemp("tokenizers")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "tiktoken>=0.7,<1"]
    subprocess.run(install, check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (own / "also.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    (own / "tiktoken_ext" / "ours.py").write_text(TABLE)
    return python


def counted(python: Path, agents: list[dict[str, Any]]) -> dict[str, Any]:
    """What a worker counts with. It has no network: its proxy does not exist."""
    env = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [python, "-c", PROGRAM, json.dumps(agents)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def counting(agent_id: str, model: str | None = None, **config: Any) -> dict[str, Any]:
    return agent(
        agent_id,
        llm={"provider": "mock", **({"model": model} if model else {})},
        context_assembler={"type": "sliding_window", "config": config},
    )


def test_tokens_are_counted_with_the_table_of_an_encoding(python: Path) -> None:
    """It is loaded before the first run. A model without a table that can be loaded has the estimate."""
    agents = [counting("ours", encoding="ours"), counting("known", "gpt-4o"), counting("other", "claude-x")]

    found = counted(python, agents)

    assert found["names"] == {
        "ours": "ours",
        "known": "estimate: bytes/4",
        "other": "estimate: bytes/4",
    }
    words, special, long, emoji = found["counts"]
    assert (words, special, emoji) == (2, 7, 4)  # the name of a special token is text like any other
    assert 4_000 <= long <= 4_010
