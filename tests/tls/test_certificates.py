"""Certificates that are wrong: one coded error that names TLS, at a producer and when a worker starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from openagents_worker.celery.unreachable import lasting_problem, lasting_problem_of_celery
from openagents_worker.errors import ConfigValidationError, RedisUnreachable
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.settings import load_settings
from openagents_worker.store.client import Cell, Store
from tests.tls.servers import Servers

pytestmark = pytest.mark.long

REQUEST = {"agent_id": "assistant", "session_id": "s1", "input_text": "hi"}


def _ca(file: Path) -> str:
    return f"ssl_ca_certs={quote(str(file))}"


WRONG: dict[str, tuple[Callable[[Servers], str], str, str]] = {
    "expired": (
        lambda s: f"rediss://localhost:{s.tls_expired.port}/0?{_ca(s.certificates.ca_file)}",
        "certificate has expired",
        "renew the certificate",
    ),
    "another CA": (
        lambda s: f"rediss://localhost:{s.tls.port}/0?{_ca(s.certificates.stranger_file)}",
        "the certificate of the server is not accepted",
        "ssl_ca_certs=",
    ),
    "no CA": (
        lambda s: f"rediss://localhost:{s.tls.port}/0",
        "the certificate of the server is not accepted",
        "ssl_ca_certs=",
    ),
    "another name": (
        lambda s: f"rediss://localhost:{s.tls_other_name.port}/0?{_ca(s.certificates.ca_file)}",
        "localhost",
        "ssl_check_hostname=false",
    ),
    "another address": (
        lambda s: f"rediss://127.0.0.1:{s.tls_other_name.port}/0?{_ca(s.certificates.ca_file)}",
        "127.0.0.1",
        "ssl_check_hostname=false",
    ),
}
"""The mistake, the text of its error, and the hint."""


@pytest.mark.parametrize(("url", "says", "hint"), WRONG.values(), ids=WRONG)
def test_a_producer_is_told_and_nothing_is_accepted(
    url: Callable[[Servers], str], says: str, hint: str, servers: Servers
) -> None:
    """`redis.unreachable`, of which repeating makes nothing better."""
    with Client(url(servers)) as client, pytest.raises(RedisUnreachable) as caught:
        client.submit(REQUEST)

    error = caught.value
    assert (error.code, error.retryable) == ("redis.unreachable", False)
    assert says in error.message
    assert hint in (error.hint or "")


@pytest.mark.parametrize(("url", "says", "hint"), WRONG.values(), ids=WRONG)
async def test_the_same_on_an_event_loop(
    url: Callable[[Servers], str], says: str, hint: str, servers: Servers
) -> None:
    """For asyncio, whose connections are made by other code."""
    async with AsyncClient(url(servers)) as client:
        with pytest.raises(RedisUnreachable) as caught:
            await client.submit(REQUEST)

    assert (caught.value.code, caught.value.retryable) == ("redis.unreachable", False)
    assert says in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_server_that_wants_tls_and_is_asked_without(servers: Servers) -> None:
    """It only closes the connection. A producer gets the hint that it may be TLS; a worker checks it."""
    url = f"redis://127.0.0.1:{servers.tls.port}/0"
    with Client(url) as client, pytest.raises(RedisUnreachable) as caught:
        client.submit(REQUEST)

    assert "rediss://" in (caught.value.hint or "")
    problem = lasting_problem(caught.value, "REDIS_URL", url)
    assert problem is not None
    assert problem.message.startswith("OPENAGENTS_REDIS_URL: ")
    assert "the server uses TLS" in problem.message


def test_a_server_without_tls_that_is_asked_with_it(servers: Servers) -> None:
    """It waits for the end of a command that is none: the same, the other way round."""
    for server in (servers.free, servers.locked):
        url = f"rediss://127.0.0.1:{server.port}/0"
        with Client(url) as client, pytest.raises(RedisUnreachable) as caught:
            client.submit(REQUEST)

        assert "redis://" in (caught.value.hint or "")
        problem = lasting_problem(caught.value, "REDIS_URL", url)
        assert problem is not None
        assert "must begin with redis://" in (problem.hint or "")


def test_a_server_that_wants_a_certificate_of_ours(servers: Servers) -> None:
    """A client learns of it only when it has sent a command, and then often as a reset: a worker asks."""
    url = f"rediss://localhost:{servers.refusing.port}/0?{_ca(servers.certificates.ca_file)}"
    with Client(url) as client, pytest.raises(RedisUnreachable) as caught:
        client.submit(REQUEST)

    assert "ssl_certfile" in (caught.value.hint or "")
    problem = lasting_problem(caught.value, "REDIS_URL", url)
    assert problem is not None
    assert "certificate required" in problem.message
    assert "ssl_certfile" in (problem.hint or "")


def test_a_server_that_hangs_up_without_a_word_may_want_a_certificate(servers: Servers) -> None:
    """It is logged, and the worker waits for the server, which may be starting."""
    url = f"rediss://localhost:{servers.tls_mutual.port}/0?{_ca(servers.certificates.ca_file)}"
    with Client(url) as client, pytest.raises(RedisUnreachable) as caught:
        client.submit(REQUEST)

    assert "ssl_certfile" in (caught.value.hint or "")
    assert lasting_problem(caught.value, "REDIS_URL", url) is None


def test_a_redis_that_is_away_is_waited_for(servers: Servers) -> None:
    """Nothing listens there, with or without TLS: the server may still start."""
    for url in ("redis://127.0.0.1:1/0", "rediss://127.0.0.1:1/0", f"unix://{servers.socket}.gone"):
        with Client(url) as client, pytest.raises(RedisUnreachable) as caught:
            client.submit(REQUEST)
        assert caught.value.retryable
        assert lasting_problem(caught.value, "REDIS_URL", url) is None


@pytest.mark.parametrize(("url", "says", "hint"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("variable", ["BROKER_URL", "RESULT_BACKEND"])
def test_a_broker_and_a_backend_of_their_own_are_looked_at_too(
    variable: str, url: Callable[[Servers], str], says: str, hint: str, servers: Servers
) -> None:
    """Celery would try for ever to connect, and the worker would say that it is ready."""
    settings = load_settings(
        {"OPENAGENTS_REDIS_URL": servers.free.url, f"OPENAGENTS_{variable}": url(servers)}
    )
    problem = lasting_problem_of_celery(settings)

    assert problem is not None
    assert problem.message.startswith(f"OPENAGENTS_{variable}: ")
    assert says in problem.message
    assert hint in (problem.hint or "")


def test_files_that_cannot_be_used_are_named(servers: Servers, tmp_path: Path) -> None:
    """Before anything is connected to: the variable, the option, the file."""
    made = servers.certificates
    (tmp_path / "empty.pem").write_text("")
    own = f"ssl_certfile={quote(str(made.folder / 'client.crt'))}"
    encrypted = quote(str(made.folder / "client-encrypted.key"))
    for options, says in {
        "ssl_ca_certs=/no/ca.pem": "file of the option ssl_ca_certs cannot be read: /no/ca.pem: No such file",
        f"ssl_ca_certs={tmp_path}/empty.pem": "ssl_ca_certs is not a file of PEM certificates",
        "ssl_certfile=/no/c.pem": "file of the option ssl_certfile cannot be read: /no/c.pem",
        f"{own}&ssl_keyfile=/no/k.pem": "file of the option ssl_keyfile cannot be read: /no/k.pem",
        f"{own}": "ssl_certfile and ssl_keyfile are not a PEM certificate and its key",
        f"{own}&ssl_keyfile={encrypted}": "whether the key needs ssl_password",
        f"{own}&ssl_keyfile={encrypted}&ssl_password=hunter2": "whether the key needs ssl_password",
        "ssl_ciphers=NONE%2BSUCH": "ssl_ciphers contains no cipher",
    }.items():
        settings = load_settings({"OPENAGENTS_REDIS_URL": f"rediss://:hunter2@host?{options}"})
        with pytest.raises(ConfigValidationError) as caught:
            Client(settings=settings)
        assert "OPENAGENTS_REDIS_URL: " in caught.value.message
        assert says in caught.value.message
        assert "hunter2" not in str(caught.value)


def test_a_certificate_that_was_replaced_is_read_again(servers: Servers, tmp_path: Path) -> None:
    """Certificates live for weeks where workers live for months."""
    file = tmp_path / "ca.pem"
    made = servers.certificates
    file.write_bytes(made.stranger_file.read_bytes())
    url = f"rediss://localhost:{servers.tls.port}/0?{_ca(file)}"
    client = Client(url)
    with pytest.raises(RedisUnreachable, match="not accepted"):
        client.submit(REQUEST)

    file.write_bytes(made.ca_file.read_bytes())

    client.submit(REQUEST)
    client.close()
    client.app.close()


def test_a_worker_does_not_start_and_says_why(servers: Servers) -> None:
    """It ends with the code of a wrong configuration, instead of being ready for runs that never come."""
    url = WRONG["another CA"][0](servers)
    done = subprocess.run(
        [sys.executable, "-m", "openagents_worker.cli", "worker"],
        env={**os.environ, "OPENAGENTS_REDIS_URL": url},
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert done.returncode == 2, done.stderr
    assert "error: redis.unreachable: OPENAGENTS_REDIS_URL: TLS with Redis at rediss://" in done.stderr
    assert "hint: TLS: add the file of the CA" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_says_so_too(servers: Servers) -> None:
    """With the exit code of a Redis that cannot be reached."""
    done = subprocess.run(
        [sys.executable, "-m", "openagents_worker.cli", "runs"],
        env={**os.environ, "OPENAGENTS_REDIS_URL": WRONG["expired"][0](servers)},
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert done.returncode == 4
    assert "certificate has expired" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cell_does_not_show_its_password() -> None:
    """It is shown in tracebacks with local variables, for example by Sentry."""
    assert "hunter2" not in f"{Cell('redis://:hunter2@host/0')!r}"
    with pytest.raises(ConfigValidationError) as caught:
        Store(Cell("redis://:hunter2/x@host/0"))
    assert "hunter2" not in str(caught.value)
