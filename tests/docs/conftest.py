"""The deployment that the documentation's blocks reach: a real Redis, a model server, a worker process."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, blocks_of_pages
from tests.support.deployment import agent, call, installed

PRELUDES = ROOT / "tests" / "docs" / "preludes"
AGENTS = (
    agent("assistant", tools={"calc": {"type": "calc"}}),
    agent(
        "sales",
        llm={"provider": "scripted", "script": [{"text": '{"item": "parcel", "cents": 450}'}]},
    ),
    agent("support", tools={"calc": {"type": "calc"}}),
    agent("reporter", llm={"provider": "scripted", "script": [{"text": "Nothing happened."}]}),
    agent("slow", llm={"provider": "scripted", "script": [{"text": "late"}], "latency_ms": 600_000}),
)


@dataclass(frozen=True)
class Deployment:
    """Where blocks run. `env` is what their processes see."""

    env: Mapping[str, str]
    folder: Path
    test_results: dict[str, dict[str, str]] = field(default_factory=dict)
    """What the blocks that are tests have said, by their prelude and name."""

    def project(self, page: str) -> Path:
        """The folder of a page, with the files that its blocks are (`<!-- test: file=PATH -->`)."""
        folder = self.folder / page.replace("/", "_")
        if not folder.exists():
            folder.mkdir()
            for block in blocks_of_pages():
                if block.page == page and "file" in block.directive:
                    write_file(folder, block)
        return folder


def write_file(folder: Path, block: Block) -> Path:
    """The block as the file that its page calls it."""
    path = folder / block.directive["file"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)
    return path


@pytest.fixture(scope="package")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Generator[Deployment]:
    """One worker for all pages."""
    folder = tmp_path_factory.mktemp("docs")
    with installed(folder, *AGENTS) as installation:
        installation.model.will_say(
            {"tool_calls": [call("calc", expression="17*23")]},
            {"text": "17*23 is 391."},
        )
        env = {
            **os.environ,
            "OPENAGENTS_REDIS_URL": installation.stack.redis_url,
            "OPENAGENTS_CONFIG": str(folder / "agents.json"),
            "OPENAI_API_KEY": "no-key-needed",
            "ANTHROPIC_API_KEY": "no-key-needed",
            "MODEL_URL": installation.model.server.url,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        yield Deployment(env, folder)
