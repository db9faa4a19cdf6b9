"""No message makes a worker import a module: only the agents file and the settings name code.

A real worker has a module `canary` on its path, which creates a file when it is imported. Messages and
requests name it in every place where a library might look for a name.
"""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
import uuid
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest

from openagents_worker import StopReason
from openagents_worker.errors import OpenAgentsError
from tests.support.deployment import Installation, agent, call, installed
from tests.support.waiting import wait_for

pytestmark = pytest.mark.fresh_process(
    reason="a module that is imported before cannot be seen to be imported"
)
NAME = "canary.thing"
CANARY = "open({sung!r}, 'w').close()\ndef thing(*a, **k): pass\n"
IDS = {"agent_id": "clerk", "session_id": "s"}


class Bomb:
    """Unpickling it imports the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("canary",)


@pytest.fixture(autouse=True)
def nothing_is_refused() -> None:
    """This Redis has one user."""


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canary")
    (folder / "canary.py").write_text(CANARY.format(sung=str(folder / "sung")))
    return folder


@pytest.fixture(scope="module")
def shop(canary: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Installation]:
    clerk = agent("clerk", tools={"modules": "tests.access.modules.modules"})
    root = Path(__file__).parents[2]
    with installed(tmp_path_factory.mktemp("shop"), clerk, PYTHONPATH=f"{root}:{canary}") as installation:
        yield installation


def imported(shop: Installation) -> set[str]:
    """The modules that the worker has imported, as returned by a run."""
    shop.model.will_say({"tool_calls": [call("modules")]}, {"text": "fine"})
    handle = shop.submit("clerk")
    assert handle.wait(timeout=60).stop_reason is StopReason.COMPLETED
    tools = [point for point in shop.client.checkpoints(handle.id) if point.kind == "tool"]
    return set(tools[0].value["data"] if isinstance(tools[0].value, dict) else tools[0].value)


@pytest.mark.parametrize(
    "module",
    [
        "jsonschema",
        "openagents_worker.llm.anthropic_messages",
        "openagents_worker.llm.litellm_client",
        "openagents_worker.llm.mock",
        "openagents_worker.llm.openai_responses",
        "openagents_worker.llm.scripted",
        "openagents_worker.patterns.plan_execute",
        "openagents_worker.patterns.reflexion",
        "openagents_worker.tools.builtin.http",
    ],
)
def test_a_worker_does_not_load_what_its_agents_do_not_use(shop: Installation, module: str) -> None:
    """Its start delays the runs of a dead worker that it replaces, and imports are most of a start."""
    loaded = imported(shop)

    assert {"httpx", "openagents_worker.llm.openai_chat", "openagents_worker.patterns.react"} <= loaded
    assert module not in loaded


def message(body: Any = None, *, raw: bytes | None = None, **changed: Any) -> dict[str, Any]:
    """A message in the form in which kombu stores it, with these headers. `properties` are its properties."""
    run_id = uuid.uuid4().hex
    content = changed.pop("content_type", "application/json")
    encoding = changed.pop("content_encoding", "utf-8")
    fields = [[{**IDS, "input_text": "Go.", "run_id": run_id}], {}, {}] if body is None else body
    text = base64.b64encode(raw).decode() if raw is not None else json.dumps(fields)
    return {
        "body": text,
        "content-encoding": encoding,
        "content-type": content,
        "headers": {"lang": "py", "task": "tasks.run_agent", "id": run_id, "root_id": run_id, **changed},
        "properties": {
            "delivery_info": {"exchange": "", "routing_key": "agents"},
            "delivery_tag": uuid.uuid4().hex,
            "body_encoding": "base64" if raw is not None else None,
        },
    }


PICKLED = pickle.dumps([[Bomb()], {}, {}])
YAML = b"!!python/object/apply:importlib.import_module [canary]"
SIGNATURE = {"task": NAME, "args": [], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": True}
TYPED = {"__type__": NAME, "__value__": {}}
EXCEPTION = {"exc_type": "thing", "exc_module": "canary", "exc_message": "x"}


def body(args: Any = None, kwargs: Any = None, embed: Any = None) -> list[Any]:
    good = {**IDS, "input_text": "Go.", "run_id": uuid.uuid4().hex}
    return [[good] if args is None else args, kwargs or {}, embed or {}]


def with_field(**fields: Any) -> list[Any]:
    return body([{**IDS, "input_text": "Go.", "run_id": uuid.uuid4().hex, **fields}])


MESSAGES: Mapping[str, dict[str, Any]] = {
    "a pickle": message(raw=PICKLED, content_type="application/x-python-serialize"),
    "a pickle that is called JSON": message(raw=PICKLED),
    "a pickle as binary": message(raw=PICKLED, content_encoding="binary"),
    "a pickle by its name": message(raw=PICKLED, content_type="pickle"),
    "YAML": message(raw=YAML, content_type="application/x-yaml"),
    "YAML by its name": message(raw=YAML, content_type="yaml"),
    "msgpack": message(raw=b"\x93", content_type="application/x-msgpack"),
    "a type of its own": message(raw=b"x", content_type=NAME),
    "a coding of its own": message(content_encoding=NAME),
    "a compression": message(compression=NAME),
    "a compression of kombu's": message(raw=PICKLED, compression="application/x-gzip"),
    "a task": message(task=NAME),
    "a task of a module": message(task="canary:thing"),
    "a task with another language": message(task=NAME, lang="canary"),
    "a shadow": message(shadow=NAME),
    "a typed argument": message(body([TYPED])),
    "a typed keyword": message(body(kwargs={"request": TYPED})),
    "a typed field": message(with_field(input_text=TYPED)),
    "a pydantic class": message(body([{"__type__": "pydantic", "__value__": {"module": "canary"}}])),
    "a Django model": message(body([{"__type__": "django", "__value__": {"app": "canary"}}])),
    "a callback": message(body(embed={"callbacks": [SIGNATURE]})),
    "an errback": message(body(embed={"errbacks": [SIGNATURE]})),
    "a chain": message(body(embed={"chain": [SIGNATURE]})),
    "a chord": message(body(embed={"chord": SIGNATURE})),
    "a callback that is a name": message(body(embed={"callbacks": [NAME]})),
    "an exception": message(body([EXCEPTION])),
    "an exception in the headers": message(exc_info=EXCEPTION, errback=NAME),
    "an error handler": message(errbacks=[SIGNATURE]),
    "a stamp": message(stamped_headers=[NAME], stamps={NAME: [NAME]}),
    "a group": message(group=NAME, group_index=0),
    "an origin": message(origin=NAME, replaced_task_nesting=0),
    "a loader": message(loader=NAME, backend=NAME, serializer=NAME),
    "an agent by its class": message(with_field(agent_id=NAME)),
    "a session": message(with_field(session_id=NAME)),
    "deps": message(with_field(deps=NAME)),
    "an output": message(with_field(output=NAME)),
    "an output type": message(with_field(output_type=NAME)),
    "a schema with a reference": message(
        with_field(output_type={"type": "object", "$ref": "python://canary/thing"})
    ),
    "an impl": message(with_field(impl=NAME, pattern={"impl": NAME})),
    "tools": message(with_field(tools=[{"id": "t", "impl": NAME}])),
    "a model": message(with_field(llm={"provider": NAME})),
    "context hints": message(with_field(context_hints={"impl": NAME, "__class__": NAME})),
    "a queue": message(with_field(queue=NAME)),
    "labels": message(with_field(labels={"impl": NAME})),
    "py/object": message(with_field(input_text="x", metadata={"py/object": NAME})),
    "a wake-up of a run": message([["nobody", "nobody:step:1"], {}, {}], task="tasks.resume_run"),
    "a resume by a class": message([[NAME, NAME], {}, {}], task="tasks.resume_run"),
    "pruning with arguments": message([[NAME], {"module": NAME}, {}], task="tasks.prune"),
    "recovering with arguments": message([[NAME], {"module": NAME}, {}], task="tasks.recover_runs"),
    "Celery's own map": message([[SIGNATURE, [NAME]], {}, {}], task="celery.map"),
    "Celery's own group": message([[[SIGNATURE], None, None], {}, {}], task="celery.group"),
    "Celery's own chain": message([[[SIGNATURE]], {}, {}], task="celery.chain"),
    "Celery's own chord": message([[[SIGNATURE], SIGNATURE], {}, {}], task="celery.chord"),
}


def test_no_message_imports_anything(shop: Installation, canary: Path) -> None:
    """Each message is taken from the queue.

    Whatever happens to it, the worker has not imported the module that it names, and executes the next run.
    """
    assert len(MESSAGES) >= 50
    imported(shop)  # modules that the first run imports
    first = imported(shop)
    assert "openagents_worker.worker.process" in first
    redis = shop.client.store.redis
    for name, one in MESSAGES.items():
        redis.lpush("agents", json.dumps(one))
        wait_for(lambda: not redis.llen("agents"), f"{name} is taken")
    wait_for(lambda: not redis.hlen("unacked"), "none of them is left half-way")

    after = imported(shop)

    assert not (canary / "sung").exists()
    assert "canary" not in after
    assert {name for name in after - first if name.partition(".")[0] not in ALLOWED} == set()


@pytest.mark.long
def test_importing_the_canary_is_detected(tmp_path: Path) -> None:
    (tmp_path / "canary.py").write_text(CANARY.format(sung=str(tmp_path / "sung")))
    subprocess.run([sys.executable, "-c", "import canary"], cwd=tmp_path, check=True)
    assert (tmp_path / "sung").exists()


ALLOWED = {"encodings", "asyncio", "celery", "kombu", "openagents_worker", "vine", "billiard"}
"""Parts of what is installed that are imported when they are needed for the first time."""


@pytest.mark.long
def test_no_request_imports_anything(shop: Installation, canary: Path) -> None:
    """The same with requests of a producer, which refuses invalid ones before it sends anything."""
    shop.model.will_say({"text": "fine"})
    for field in ("agent_id", "session_id", "deps", "output_type", "queue", "tenant", "impl", "tools", "llm"):
        for value in (NAME, {"impl": NAME}, TYPED, [NAME]):
            try:
                shop.run_agent.delay({**IDS, "input_text": "Go.", field: value}).cancel()
            except OpenAgentsError as error:
                assert error.code  # noqa: PT017 - each has one; which, other tests say
    assert "canary" not in imported(shop)
    assert not (canary / "sung").exists()
