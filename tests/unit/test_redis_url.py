"""Redis URLs: their values, the same values for each client, and the errors of wrong URLs."""

from __future__ import annotations

import ssl
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu import Connection
from kombu.utils.url import parse_url
from pydantic import ValidationError

from openagents_worker.errors import ConfigValidationError
from openagents_worker.redaction import safe_url
from openagents_worker.redis_tls import CertReqs, Tls
from openagents_worker.redis_url import RedisAddress, as_redis, redis_url_of_connection
from openagents_worker.settings import Settings, load_settings

FULL = RedisAddress(
    "host.example",
    6380,
    db=3,
    username="wörk:er",
    password="p@ss:w/o?r#d%&=+; €",
    tls=Tls(
        CertReqs.OPTIONAL,
        check_hostname=False,
        ca_certs="/etc/a ca+b.pem",
        certfile="/c.crt",
        keyfile="/c.key",
        key_password="hunter&2",
        ciphers="ECDHE+AESGCM",
    ),
    socket_timeout_s=5.5,
    socket_connect_timeout_s=2,
    health_check_interval_s=30,
    protocol=3,
    client_name="shop",
)
AT_SOCKET = RedisAddress(path="/run/a b.sock", db=2, username="me", password="p@ss")

logins = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda text: text.strip())


@pytest.mark.parametrize("address", [FULL, AT_SOCKET, RedisAddress("::1"), RedisAddress()], ids=repr)
def test_every_spelling_says_the_same(address: RedisAddress) -> None:
    """Ours, and Celery's of a socket."""
    assert RedisAddress.of(address.url) == address
    without_limits = replace(
        address, socket_timeout_s=None, socket_connect_timeout_s=None, health_check_interval_s=None
    )
    celery = RedisAddress.of(address.as_broker().url)
    expected = replace(without_limits, tls=celery.tls, protocol=None, client_name=None)
    assert celery == expected


@given(username=st.none() | logins, password=st.none() | logins)
def test_any_login_reaches_celery_as_it_was_meant(username: str | None, password: str | None) -> None:
    """With any characters; kombu and this library decode what this library has encoded."""
    address = RedisAddress(username=username, password=password)

    parsed = parse_url(address.as_broker().url)

    assert (parsed["userid"], parsed["password"]) == (username, password)
    assert RedisAddress.of(address.url) == address
    at_socket = replace(address, path="/run/r.sock")
    assert RedisAddress.of(at_socket.as_broker().url) == at_socket


def test_everybody_is_told_each_choice_of_tls() -> None:
    """The defaults of redis-py, kombu and Celery differ, and have changed between their versions."""
    for options in (FULL.redis_options(), FULL.as_broker().use_ssl, FULL.as_backend().use_ssl):
        assert options is not None
        assert {name: options[name] for name in options if name.startswith("ssl_")} == {
            "ssl_cert_reqs": "optional",
            "ssl_check_hostname": False,
            "ssl_ca_certs": "/etc/a ca+b.pem",
            "ssl_certfile": "/c.crt",
            "ssl_keyfile": "/c.key",
            "ssl_password": "hunter&2",
            "ssl_ciphers": "ECDHE+AESGCM",
        }
    assert "ssl" not in FULL.as_broker().url.replace("rediss", "")


@pytest.mark.parametrize(
    ("url", "cert_reqs", "check_hostname"),
    [
        ("rediss://host", CertReqs.REQUIRED, True),
        ("rediss://host?ssl_cert_reqs=required", CertReqs.REQUIRED, True),
        ("rediss://host?ssl_cert_reqs=CERT_REQUIRED", CertReqs.REQUIRED, True),
        ("rediss://host?ssl_cert_reqs=CERT_OPTIONAL&ssl_check_hostname=False", CertReqs.OPTIONAL, False),
        ("rediss://host?ssl_cert_reqs=none", CertReqs.NONE, False),
        ("rediss://host?ssl_cert_reqs=CERT_NONE", CertReqs.NONE, False),
    ],
)
def test_what_is_checked_of_a_server(url: str, cert_reqs: CertReqs, check_hostname: bool) -> None:
    """The spelling of redis-py and that of Celery. A certificate is required unless the URL says no."""
    tls = RedisAddress.of(url).tls
    assert tls is not None
    assert (tls.cert_reqs, tls.check_hostname) == (cert_reqs, check_hostname)


WRONG = {
    "redis://:hunter2/x@host": "login contains a /",
    "redis://:hunter2?x@host": "@ after the ?",
    "redis://:hunter2#x@host": "contains a #",
    "redis://:hunter2 x@host": "space",
    "redis://:hunter2@x@[host": "host and port",
    "redis://hunter2:x:y": "host and port",
    "redis://:%FFhunter2@host": "not valid UTF-8",
    "redis://host:0": "host and port",
    "redis://host:65536": "host and port",
    "redis://host/zero": "database must be a number",
    "redis://host/1?db=2": "two different databases",
    "redis://me:hunter2@host?password=x": "password before the @ and after the",
    "redis://host?socket_timeout": "name=value",
    "redis://host?socket_timeout=": "socket_timeout is empty",
    "redis://host?socket_timeout=1": "socket_timeout must be a number of seconds, at least 2; found '1'",
    "redis://host?socket_timeout=nan": "socket_timeout must be a number",
    "redis://host?socket_connect_timeout=soon": "socket_connect_timeout must be a number",
    "redis://host?health_check_interval=0": "interval must be a whole number of seconds, at least 1",
    "redis://host?protocol=4": "protocol must be 2 or 3; found '4'",
    "redis://host?client_name=two%20words": "client_name must be one word",
    "redis://host?db=1&db=2": "db is given twice",
    "redis://host?virtual_host=1": "virtual_host is only for Unix sockets",
    "redis://host?max_connections=5": "max_connections is not supported",
    "redis://host?sock_timeout=5": "did you mean socket_timeout",
    "redis://host?decode_responses=true": "decode_responses is not supported",
    "redis://host?ssl=true": "begins with rediss://",
    "redis://host?ssl_cert_reqs=none": "ssl_cert_reqs requires TLS: a URL with TLS begins with rediss://",
    "unix:///r.sock?ssl_ca_certs=/ca.pem": "ssl_ca_certs requires TLS",
    "unix:///r.sock?socket_connect_timeout=2": "socket_connect_timeout has no effect",
    "unix://r.sock": "must begin with a /",
    f"unix:///{'r' * 107}": "longer than 107 bytes",
    "unix:///r.sock?db=1&virtual_host=2": "two different databases",
    "rediss://host?ssl_cert_reqs=perhaps": "ssl_cert_reqs must be required, optional or none",
    "rediss://host?ssl_check_hostname=perhaps": "ssl_check_hostname must be true or false",
    "rediss://host?ssl_cert_reqs=none&ssl_check_hostname=true": "ssl_check_hostname=true requires",
    "rediss://host?ssl_keyfile=/k": "ssl_keyfile requires ssl_certfile",
    "rediss://host?ssl_password=hunter2": "ssl_password requires ssl_certfile and ssl_keyfile",
    "redis://one;redis://two": "database must be a number",
}


@pytest.mark.parametrize(("url", "says"), WRONG.items())
@pytest.mark.parametrize("variable", ["REDIS_URL", "BROKER_URL", "RESULT_BACKEND"])
def test_a_wrong_url_is_refused_without_being_shown(variable: str, url: str, says: str) -> None:
    """The error names the variable, the option and the right form. Any part of the URL may be a password."""
    with pytest.raises(ConfigValidationError) as caught:
        load_settings({f"OPENAGENTS_{variable}": url})

    assert f"OPENAGENTS_{variable}: " in caught.value.message
    assert says in caught.value.message
    assert "hunter2" not in str(caught.value)


def test_a_redis_without_resp3_cannot_be_the_broker() -> None:
    """kombu has no such option: it would be ignored in Flower and by `celery inspect`."""
    url = "redis://host?protocol=2"
    for env in ({"OPENAGENTS_REDIS_URL": url}, {"OPENAGENTS_BROKER_URL": url}):
        with pytest.raises(ConfigValidationError, match="OPENAGENTS_BROKER_URL: a Redis with protocol=2"):
            load_settings(env)
    assert load_settings({"OPENAGENTS_REDIS_URL": url, "OPENAGENTS_BROKER_URL": "redis://other"})


@pytest.mark.parametrize("url", ["http://:hunter2@host", "host:6379", "hunter2"])
def test_what_names_no_redis_is_refused_where_there_must_be_one(url: str) -> None:
    """A broker and a backend may be of any kind."""
    with pytest.raises(
        ConfigValidationError, match=r"OPENAGENTS_REDIS_URL: .*must begin with redis://"
    ) as caught:
        load_settings({"OPENAGENTS_REDIS_URL": url})

    assert "hunter2" not in str(caught.value)
    assert load_settings({"OPENAGENTS_BROKER_URL": "amqp://host"}).broker_url == "amqp://host"


def test_passwords_are_shown_nowhere() -> None:
    """Not in settings, addresses, errors and logs; not even one as long as a token is."""
    long = replace(FULL, password="hunter2" * 500)
    settings = load_settings({"OPENAGENTS_REDIS_URL": long.url, "OPENAGENTS_RESULT_BACKEND": long.url})
    shown = f"{settings!r} {settings} {settings.redis_url_safe} {long!r} {safe_url(long.as_broker().url)}"

    assert "host.example:6380" in shown
    assert "hunter" not in shown
    with pytest.raises(ValidationError) as caught:
        Settings(redis_url="redis://:hunter2 x@host")
    assert "hunter2" not in str(caught.value)


def test_the_redis_of_a_products_app_is_read_with_its_tls() -> None:
    """There `broker_use_ssl` is separate from the URL: with constants, with names, or not set."""
    use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": "/ca.pem", "ssl_certfile": None}
    for url in ("redis://:p%40@host/2", "rediss://:p%40@host/2"):
        with Connection(url, ssl=use_ssl) as connection:
            assert redis_url_of_connection(connection, {}) == (
                "rediss://:p%40@host:6379/2?ssl_cert_reqs=required&ssl_check_hostname=true&ssl_ca_certs=%2Fca.pem"
            )


@pytest.mark.parametrize(
    ("broker", "use_ssl", "url"),
    [
        ("redis://[::1]:7/2", None, "redis://[::1]:7/2"),
        ("redis://host", None, "redis://host:6379/0"),
        ("redis+socket:///r.sock?virtual_host=2", None, "unix:///r.sock?db=2"),
        ("redis+socket:///r.sock?credential_provider=a.b", None, None),
        ("redis://one;redis://two", None, None),
        ("redis://host", {"ssl_ca_data": "…"}, None),
        ("amqp://host//", None, None),
        ("memory://", None, None),
    ],
)
def test_a_broker_whose_queues_cannot_be_read_is_none(
    broker: str, use_ssl: dict[str, str] | None, url: str | None
) -> None:
    """Several, one of another kind, one with an option that no URL has: then lost messages are not seen."""
    with Connection(broker, ssl=use_ssl) as connection:
        assert redis_url_of_connection(connection, {}) == url


def test_both_spellings_of_a_socket_are_one() -> None:
    """Celery has its own default."""
    assert as_redis("redis+socket://me:p%40@/run/r.sock?virtual_host=2") == "unix://me:p%40@/run/r.sock?db=2"
