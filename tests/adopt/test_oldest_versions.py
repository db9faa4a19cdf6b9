"""The base install with the oldest allowed versions, in a separate virtual environment.

A product has its own pins. There the producer's half of this library does all that it does here; the worker
beside it, a process from this environment, has the newest versions.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.adopt.oldest import OldProduct, lowest_versions
from tests.sentinel.watched import watching
from tests.support.deployment import Installation, agent, call, installed
from tests.support.waiting import PATIENCE_S, wait_for
from tests.tls.certificates import Certificates
from tests.tls.servers import TlsEnd

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(
        sys.version_info >= (3, 13),
        reason="pydantic 2.7, the oldest that is promised, needs Python 3.12 or older",
    ),
]

ANSWER = "391"
CLOSED = "redis://127.0.0.1:1/0"
ONLY_FOR_WORKERS = {"greenlet", "h11", "hiredis", "httpx", "jsonschema", "sniffio", "flower"}


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> OldProduct:
    return OldProduct.installed(tmp_path_factory.mktemp("old") / "venv")


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Generator[Installation]:
    nowhere = {"api_base": "http://127.0.0.1:1/v1", "retry": {"max_attempts": 1}}
    agents = (
        agent("clerk", tools={"calc": {"type": "calc"}}),
        agent("lingerer", tools={"linger": "tests.celery.tools.linger"}),
        agent("broken", llm=nowhere),
    )
    with installed(tmp_path_factory.mktemp("worker"), *agents) as installation:
        installation.model.will_say({"tool_calls": [call("calc", expression="17*23")]}, {"text": ANSWER})
        yield installation


@pytest.fixture
def tell(product: OldProduct, installation: Installation) -> Any:
    """Runs a program of the application, which knows only the URL of Redis."""
    url = installation.stack.redis_url
    return lambda program, **how: product.tell(program, **{"OPENAGENTS_REDIS_URL": url, **how})


def whole(seqs: list[int]) -> bool:
    """From the first to the last event of a run with two model calls and a tool."""
    return len(seqs) > 20 and seqs == list(range(1, len(seqs) + 1))


def test_they_are_the_oldest_and_there_is_nothing_of_the_workers(product: OldProduct) -> None:
    """What the other tests say, they say of these versions."""
    versions = product.versions()

    assert {name: versions[name] for name in lowest_versions()} == lowest_versions()
    assert ONLY_FOR_WORKERS.isdisjoint(versions)


def test_the_oldest_versions_are_as_old_as_promised() -> None:
    """A product on any Celery from 5.4, redis-py from 5 and pydantic from 2.7 can install this library."""
    lowest = {name: (version.major, version.minor) for name, version in lowest_versions().items()}

    assert lowest["celery"] <= (5, 4)
    assert lowest["kombu"] <= (5, 4)
    assert lowest["redis"] <= (5, 0)
    assert lowest["pydantic"] <= (2, 7)


@pytest.mark.parametrize(
    "statement",
    [
        "import openagents_worker",
        "import openagents_worker.models",
        "from openagents_worker import *",
        "from openagents_worker import run_agent; run_agent.delay",
        "import celery, openagents_worker; openagents_worker.register(celery.Celery('product'))",
    ],
)
def test_importing_warns_of_nothing(product: OldProduct, statement: str) -> None:
    """A product that treats warnings as errors can import us."""
    done = product.python("-c", statement)

    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_is_submitted_watched_and_waited_for(tell: Any) -> None:
    """What the README shows first, and the rest of a Celery result."""
    told = tell("submit_and_wait")

    assert whole(told["seqs"])
    assert told["names"][-2:] == ["run.completed", "session.run.completed"]
    assert told["again"] == told["seqs"][3:]
    assert (told["output"], told["got"]) == (ANSWER, ANSWER)
    assert told["celery"] == ["SUCCESS", True, True, False]
    assert (told["record"]["state"], told["record"]["steps"]) == ("completed", told["steps"])


def test_the_same_on_an_event_loop(tell: Any) -> None:
    """`adelay`, `AsyncRunHandle` and `AsyncClient`."""
    told = tell("submit_and_wait_on_a_loop")

    assert whole(told["seqs"])
    assert (told["output"], told["client"]) == (ANSWER, ANSWER)
    assert told["transcript"] == ["user", "assistant"]


def test_loops_connections_and_forks_are_looked_after(tell: Any) -> None:
    """What a loop that was closed by hand has left is found, what the server closed is not used, and a child
    has connections of its own."""
    told = tell("use_loops_and_forks")

    assert told["most"] <= 3
    assert told["left"] <= 1
    assert told["child_knows"] == 1


def test_the_same_by_way_of_a_sentinel(installation: Installation, tell: Any, tmp_path: Path) -> None:
    """redis-py 5 and kombu 5.4 ask for the master in their own ways, on a loop and without one."""
    redis = installation.stack.redis
    assert redis is not None
    with watching(redis.port, tmp_path) as sentinel:
        # redis-py closes its connections to sentinels from 8.1 on.
        told = tell("submit_and_wait", leaves_sockets=True, OPENAGENTS_REDIS_URL=sentinel.url)
        on_a_loop = tell("submit_and_wait_on_a_loop", leaves_sockets=True, OPENAGENTS_REDIS_URL=sentinel.url)

    assert (told["output"], told["got"]) == (ANSWER, ANSWER)
    assert whole(told["seqs"])
    assert (on_a_loop["output"], on_a_loop["client"]) == (ANSWER, ANSWER)


def test_the_same_by_tls(installation: Installation, tell: Any, tmp_path: Path) -> None:
    """redis-py 5 and kombu 5.4 have other defaults for what they check, and other options."""
    made = Certificates.made(tmp_path)
    redis = installation.stack.redis
    assert redis is not None
    with TlsEnd(redis.url, made.server(wants_client=True)) as end:
        files = f"ssl_ca_certs={made.ca_file}&ssl_certfile={made.client_file}"
        url = f"rediss://localhost:{end.port}/0?{files}&socket_timeout=5&health_check_interval=7"
        told = tell("submit_and_wait", OPENAGENTS_REDIS_URL=url)
        on_a_loop = tell("submit_and_wait_on_a_loop", OPENAGENTS_REDIS_URL=url)

    assert (told["output"], told["got"]) == (ANSWER, ANSWER)
    assert whole(told["seqs"])
    assert (on_a_loop["output"], on_a_loop["client"]) == (ANSWER, ANSWER)


def test_many_watchers_see_every_event(tell: Any) -> None:
    """All of a loop share one subscription."""
    assert tell("watch_in_numbers")["whole"] == [True] * 10


def test_frames_for_a_browser_begin_where_it_left_off(tell: Any) -> None:
    """`sse()`, from the start and with Last-Event-ID."""
    told = tell("stream_to_the_web")

    assert whole([int(line.removeprefix("id: ")) for line in told["ids"]])
    assert told["last"] == "event: end"
    assert told["rest"] == told["ids"][4:]


def test_a_run_at_work_is_cancelled(installation: Installation, tell: Any) -> None:
    """By `cancel` and by Celery's `revoke`; `get` raises the run's code."""
    installation.model.will_say({"tool_calls": [call("linger")]})
    try:
        told = tell("cancel")
    finally:
        installation.model.will_say({"tool_calls": [call("calc", expression="17*23")]}, {"text": ANSWER})

    assert told == {how: ["cancelled", "REVOKED", "run.cancelled"] for how in ("cancel", "revoke")}


def test_signatures_links_chains_and_groups_work(tell: Any) -> None:
    """What follows a run follows it, whichever version composed it."""
    told = tell("compose")

    assert told == {
        "first": ANSWER,
        "linked": ANSWER,
        "broken": "llm.connection",
        "after a failure": ANSWER,
        "chained": ["RunHandle", ANSWER],
        "together": [ANSWER] * 3,
        "later": ANSWER,
    }


def test_runs_go_out_by_an_app_that_was_there_before(tell: Any) -> None:
    """`register(app)` in a product's web process."""
    told = tell("submit_through_its_own_app")

    assert told == {"output": ANSWER, "together": [ANSWER] * 2, "app is untouched": True}


def test_a_run_is_accepted_without_a_broker(
    product: OldProduct, installation: Installation, tell: Any
) -> None:
    """One warning. The rescue loop of the worker finds the run whose message was not sent."""
    done = product.python(
        str(Path(__file__).with_name("old_product.py")),
        "submit_without_a_broker",
        OPENAGENTS_REDIS_URL=installation.stack.redis_url,
        OPENAGENTS_BROKER_URL=CLOSED,
    )

    assert done.stderr.count("broker.unreachable") == 1, done.stderr
    run_id = done.stdout.split('"')[3]
    wait_for(
        lambda: installation.client.record(run_id).state.is_terminal, "the run is carried", timeout=PATIENCE_S
    )


def test_without_redis_the_error_says_so(product: OldProduct) -> None:
    """Errors of an older redis-py are translated like those of the newest."""
    told = product.tell("submit_without_redis", OPENAGENTS_REDIS_URL=CLOSED)

    assert told == {"code": "redis.unreachable", "unknown": "redis.unreachable"}


def test_a_command_of_the_worker_says_which_extra_it_needs(product: OldProduct) -> None:
    """No traceback for a package that is not installed."""
    done = product.run("openagents-worker", "worker")

    assert done.returncode == 2
    assert "pip install 'openagents-worker[worker]'" in done.stderr
    assert "Traceback" not in done.stderr
