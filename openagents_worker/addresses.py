"""Addresses. The only place that says of any URL which Redis it names, and how Celery spells the same Redis.

The URL of one server is taken apart in `redis_url`; what stands here besides is about sentinels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

from openagents_worker.redis_tls import Tls
from openagents_worker.redis_url import CeleryAddress, RedisAddress, Scheme

__all__ = [
    "CeleryAddress",
    "RedisAddress",
    "Sentinels",
    "address_of",
    "as_redis",
    "is_by_sentinels",
    "is_redis_url",
    "redis_url_of_connection",
]

SENTINEL_PORT = 26379
SENTINEL_FORM = "sentinel://[user:password@]host:26379,host:26379/0?master=name"
SENTINEL_OPTIONS = ("master", "master_name", "sentinel_username", "sentinel_password")

_SENTINEL_URL = re.compile(
    r"sentinel://(?:(?P<login>[^/?#]*)@)?(?P<hosts>[^@/?#]*)(?:/(?P<db>[^?#]*))?(?:\?(?P<query>[^#]*))?"
)
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:\[\]\s]+)(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class Sentinels:
    """A Redis that sentinels watch: whom to ask for its master, and the logins of both.

    >>> Sentinels.of("sentinel://:pw@one:26379,two/1?master=main").hosts
    (('one', 26379), ('two', 26379))
    """

    hosts: tuple[tuple[str, int], ...]
    master: str
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: str, master: str | None = None) -> Sentinels:
        """Take a URL apart: hosts by commas, or kombu's list of URLs by semicolons.

        `master` is its name where the URL gives none. Raises `ValueError`, whose text shows nothing of the
        URL: a wrong one may hold a password anywhere.
        """
        hosts: list[tuple[str, int]] = []
        said: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in url.split(";"))):
            more, options = _taken_apart(part)
            hosts += more
            if any(said.setdefault(name, value) != value for name, value in options.items()):
                raise ValueError("its sentinels are told of different masters, databases or logins")
        name = said.pop("master", None) or master
        if not name:
            raise ValueError(f"it does not say which master the sentinels watch: {SENTINEL_FORM}")
        return cls(tuple(dict.fromkeys(hosts)), name, int(said.pop("db", "0")), **said)

    @property
    def url(self) -> str:
        """As a setting spells it."""
        options = {
            "master": self.master,
            "sentinel_username": self.sentinel_username,
            "sentinel_password": self.sentinel_password,
        }
        query = urlencode({name: value for name, value in options.items() if value is not None})
        return f"sentinel://{self._at()}{','.join(map(_host, self.hosts))}/{self.db}?{query}"

    @property
    def celery_url(self) -> str:
        """As Celery spells it, which wants the rest as options of its transport: `celery_options`."""
        return ";".join(f"sentinel://{self._at()}{_host(host)}/{self.db}" for host in self.hosts)

    def celery_options(self, **of_sentinels: Any) -> dict[str, Any]:
        """What stands beside `celery_url`; `of_sentinels` are for the connections to the sentinels."""
        return {"master_name": self.master, "sentinel_kwargs": {**of_sentinels, **self.sentinel_login}}

    @property
    def login(self) -> dict[str, str]:
        """Of the master, as redis-py takes it."""
        return _login(self.username, self.password)

    @property
    def sentinel_login(self) -> dict[str, str]:
        """Of the sentinels themselves, as redis-py takes it."""
        return _login(self.sentinel_username, self.sentinel_password)

    def check_files(self) -> None:
        """Nothing to check: there is no TLS by way of sentinels yet."""

    def _at(self) -> str:
        if self.username is None and self.password is None:
            return ""
        password = "" if self.password is None else f":{quote(self.password, safe='')}"
        return f"{quote(self.username or '', safe='')}{password}@"


def is_by_sentinels(url: str) -> bool:
    return url.startswith("sentinel://")


def is_redis_url(url: str) -> bool:
    """Whether a URL names a Redis, rightly or wrongly."""
    return url.partition("://")[0].strip().lower() in (*Scheme, "sentinel")


def address_of(url: str) -> RedisAddress | Sentinels:
    """The Redis that a URL names. Raises `ValueError` that says what the URL of a Redis looks like."""
    return Sentinels.of(url) if is_by_sentinels(url) else RedisAddress.of(url)


def as_redis(broker_url: str, options: Mapping[str, Any] | None = None) -> str | None:
    """A broker as a URL of a Redis, and None when it is none; `options` are those of Celery's transport."""
    if is_by_sentinels(broker_url):
        return _of_celery(broker_url, options or {})
    return RedisAddress.of(broker_url).url if is_redis_url(broker_url) else None


def redis_url_of_connection(connection: Any, options: Mapping[str, Any]) -> str | None:
    """The Redis of a kombu connection, with the TLS that it uses; None where that cannot be said in a URL.

    `options` are those of Celery's transport.
    """
    hostname, choices = str(connection.hostname or ""), list(connection.alt or ())
    if is_by_sentinels(choices[0] if choices else connection.as_uri()):
        return _of_celery(";".join(choices) or connection.as_uri(include_password=True), options)
    if len(choices) > 1 or getattr(connection, "credential_provider", None) or callable(connection.password):
        return None
    if hostname.startswith("socket://"):
        try:
            return as_redis(f"redis+{hostname}")
        except ValueError:  # an option that only kombu's connections know
            return None
    if not is_redis_url(connection.as_uri()):
        return None
    tls = Tls.of_celery(connection.ssl) if isinstance(connection.ssl, Mapping) else None
    database = str(connection.virtual_host or "").strip("/") or "0"
    if (connection.ssl and tls is None) or not database.isdecimal():
        return None
    return RedisAddress(
        host=hostname or "localhost",
        port=int(connection.port or 6379),
        db=int(database),
        username=connection.userid or None,
        password=connection.password or None,
        tls=tls,
    ).url


def _of_celery(url: str, options: Mapping[str, Any]) -> str | None:
    try:
        sentinels = Sentinels.of(url, options.get("master_name"))
    except ValueError:
        return None
    login = options.get("sentinel_kwargs") or {}
    return replace(
        sentinels,
        sentinel_username=sentinels.sentinel_username or login.get("username"),
        sentinel_password=sentinels.sentinel_password or login.get("password"),
    ).url


def _taken_apart(url: str) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """The hosts of one `sentinel://` URL, and all else that it says."""
    found = _SENTINEL_URL.fullmatch(url)
    if found is None:
        raise ValueError(f"not a URL of sentinels; it is {SENTINEL_FORM}")
    query = dict(parse_qsl(found["query"] or "", keep_blank_values=True))
    if query.keys() - SENTINEL_OPTIONS:
        raise ValueError(
            f"an option after its ? is none of those that sentinels have: {', '.join(SENTINEL_OPTIONS)}"
        )
    user, _, password = (found["login"] or "").partition(":")
    said = {
        "master": query.get("master") or query.get("master_name"),
        "db": _database(found["db"]),
        "username": unquote(user),
        "password": unquote(password),
        "sentinel_username": query.get("sentinel_username"),
        "sentinel_password": query.get("sentinel_password"),
    }
    hosts = [_one_host(text) for text in found["hosts"].split(",")]
    return hosts, {name: value for name, value in said.items() if value}


def _one_host(text: str) -> tuple[str, int]:
    found = _HOST.fullmatch(text.strip())
    if found is None or not 0 < int(found["port"] or SENTINEL_PORT) < 65_536:
        raise ValueError(f"its sentinels are written host:port,host:port, as in {SENTINEL_FORM}")
    return unquote(found["host"]).strip("[]"), int(found["port"] or SENTINEL_PORT)


def _database(text: str | None) -> str | None:
    if text and not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"its database is a number, as in {SENTINEL_FORM}; a / in a password is %2F")
    return text


def _host(host: tuple[str, int]) -> str:
    name, port = host
    return f"[{name}]:{port}" if ":" in name else f"{quote(name)}:{port}"


def _login(username: str | None, password: str | None) -> dict[str, str]:
    given = {"username": username, "password": password}
    return {name: value for name, value in given.items() if value is not None}
