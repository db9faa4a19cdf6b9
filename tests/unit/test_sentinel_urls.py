"""Addresses: the values of a sentinel URL, its form for Celery, and the errors of wrong URLs."""

from __future__ import annotations

import pytest
from kombu.utils.url import parse_url

from openagents_worker.errors import ConfigValidationError
from openagents_worker.redaction import safe_url
from openagents_worker.redis_url import Sentinels, as_redis
from openagents_worker.settings import load_settings

FULL = Sentinels(
    (("one.example", 26379), ("10.0.0.2", 26380), ("fe80::1", 26379)),
    "main",
    db=3,
    username="worker",
    password="p@ss:w,o;r/d?&#%",
    sentinel_username="watcher",
    sentinel_password="other;p@ss&=",
)


def test_a_url_names_sentinels_by_commas_and_their_master() -> None:
    """Ports are optional. The login belongs to the master; the login of the sentinels is in the query."""
    url = "sentinel://me:p%40ss@one,two:26380,[::1]:7/2?master=main&sentinel_password=x"

    assert Sentinels.of(url) == Sentinels(
        (("one", 26379), ("two", 26380), ("::1", 7)),
        "main",
        db=2,
        username="me",
        password="p@ss",
        sentinel_password="x",
    )


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://:pw@one:26379/1;sentinel://:pw@two:26379/1?master_name=main",
        "sentinel://:pw@one:26379/1?master_name=main;sentinel://two:26379;",
    ],
)
def test_the_list_that_celery_knows_is_read_too(url: str) -> None:
    """Values of the first URL need not be repeated in the others."""
    expected = Sentinels((("one", 26379), ("two", 26379)), "main", db=1, password="pw")
    assert Sentinels.of(url) == expected


def test_every_spelling_says_the_same() -> None:
    """Whatever characters a password has."""
    assert Sentinels.of(FULL.url) == FULL
    assert as_redis(FULL.celery_url, FULL.celery_options()) == FULL.url
    assert as_redis(FULL.url) == FULL.url


def test_celery_gets_what_its_own_parser_understands() -> None:
    """One URL for each sentinel, and the master's name as an option of the transport."""
    parts = [parse_url(url) for url in FULL.celery_url.split(";")]

    assert [(part["hostname"], part["port"]) for part in parts] == list(FULL.hosts)
    assert {(part["userid"], part["password"], part["virtual_host"]) for part in parts} == {
        (FULL.username, FULL.password, "3")
    }
    assert FULL.celery_options(socket_timeout=1) == {
        "master_name": "main",
        "sentinel_kwargs": {"socket_timeout": 1, "username": "watcher", "password": "other;p@ss&="},
    }


def test_a_broker_of_celerys_without_a_master_is_none_that_can_be_read() -> None:
    """The setting of an application may be incomplete; its worker reports that."""
    assert as_redis("sentinel://one:26379", {}) is None
    assert as_redis("amqp://guest@host//") is None
    assert as_redis("sentinel://one:26379", {"master_name": "main"}) == "sentinel://one:26379/0?master=main"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sentinel://one:26379/0", "name of the master is missing"),
        ("sentinel://one:26379/0?master=", "name of the master is missing"),
        ("sentinel://?master=m", "host:port,host:port"),
        ("sentinel://one,,two?master=m", "host:port,host:port"),
        ("sentinel://one:port?master=m", "host:port,host:port"),
        ("sentinel://one:65536?master=m", "host:port,host:port"),
        ("sentinel://one:0?master=m", "host:port,host:port"),
        ("sentinel://:hunter2/x@one?master=m", "a / in a password as %2F"),
        ("sentinel://one/zero?master=m", "database must be a number"),
        ("sentinel://one/0?master=m&hunter2=1", "not supported"),
        ("sentinel://one;two?master=m", "not a valid sentinel URL"),
        ("sentinel://one?master=m#hunter2", "not a valid sentinel URL"),
        ("sentinel://one/0?master=m;sentinel://two/1", "different masters, databases or logins"),
        (
            "sentinel://:hunter2@one?master=m;sentinel://:hunter3@two",
            "different masters, databases or logins",
        ),
    ],
)
@pytest.mark.parametrize("variable", ["REDIS_URL", "BROKER_URL", "RESULT_BACKEND"])
def test_a_wrong_url_is_refused_without_being_shown(variable: str, url: str, says: str) -> None:
    """The error names the variable and the mistake, never the URL, which may contain a password anywhere."""
    with pytest.raises(ConfigValidationError, match=f"OPENAGENTS_{variable}: .*{says}") as caught:
        load_settings({f"OPENAGENTS_{variable}": url})

    assert caught.value.code == "config.validation"
    assert "hunter2" not in str(caught.value)


def test_the_broker_is_the_same_redis_unless_it_is_named() -> None:
    """One variable is enough."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": FULL.url})
    assert settings.redis_url == settings.broker_url == FULL.url


def test_neither_password_is_shown() -> None:
    """Settings are logged at start, and errors contain URLs."""
    settings = load_settings(
        {"OPENAGENTS_REDIS_URL": FULL.url, "OPENAGENTS_BROKER_URL": FULL.celery_url + "?master=main"}
    )
    shown = f"{settings!r} {settings.redis_url_safe} {safe_url(FULL.celery_url)} {FULL!r}"

    assert "one.example:26379" in shown
    for password in (FULL.password, FULL.sentinel_password):
        assert password is not None
        assert password not in shown
        assert password[:4] not in shown.replace("sentinel_password", "").replace("left_to_others", "")
    assert "p%40ss" not in shown
