"""Sentinels. The only place that parses the URL of a Redis behind sentinels and writes it for Celery."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

__all__ = ["Sentinels"]

SENTINEL_PORT = 26379
SENTINEL_FORM = "sentinel://[user:password@]host:26379,host:26379/0?master=name"
SENTINEL_OPTIONS = ("master", "master_name", "sentinel_username", "sentinel_password")

_SENTINEL_URL = re.compile(
    r"sentinel://(?:(?P<login>[^/?#]*)@)?(?P<hosts>[^@/?#]*)(?:/(?P<db>[^?#]*))?(?:\?(?P<query>[^#]*))?"
)
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^:\[\]\s]+)(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class Sentinels:
    """A Redis behind sentinels: their addresses, the name of the master, and both logins.

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
        """Parse a URL with hosts separated by commas, or kombu's list of URLs separated by semicolons.

        `master` is the name of the master for a URL without one. Raises `ValueError`. Its text never contains
        the URL, because a wrong URL may contain a password anywhere.
        """
        hosts: list[tuple[str, int]] = []
        options: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in url.split(";"))):
            more_hosts, more_options = _parsed_sentinel_url(part)
            hosts += more_hosts
            if any(options.setdefault(name, value) != value for name, value in more_options.items()):
                raise ValueError("the sentinel URLs have different masters, databases or logins")
        name = options.pop("master", None) or master
        if not name:
            raise ValueError(f"the name of the master is missing; write {SENTINEL_FORM}")
        return cls(tuple(dict.fromkeys(hosts)), name, int(options.pop("db", "0")), **options)

    @property
    def url(self) -> str:
        """The address as a URL for the settings of this library."""
        options = {
            "master": self.master,
            "sentinel_username": self.sentinel_username,
            "sentinel_password": self.sentinel_password,
        }
        query = urlencode({name: value for name, value in options.items() if value is not None})
        return f"sentinel://{self._login_part()}{','.join(map(_host_and_port, self.hosts))}/{self.db}?{query}"

    @property
    def celery_url(self) -> str:
        """The URL for Celery. Use it together with `celery_options`, which has the rest of the address."""
        return ";".join(
            f"sentinel://{self._login_part()}{_host_and_port(host)}/{self.db}" for host in self.hosts
        )

    def celery_options(self, **of_sentinels: Any) -> dict[str, Any]:
        """The transport options for `celery_url`; `of_sentinels` are for connections to the sentinels."""
        return {"master_name": self.master, "sentinel_kwargs": {**of_sentinels, **self.sentinel_login}}

    @property
    def login(self) -> dict[str, str]:
        """The login of the master, as arguments of redis-py."""
        return _login(self.username, self.password)

    @property
    def sentinel_login(self) -> dict[str, str]:
        """The login of the sentinels, as arguments of redis-py."""
        return _login(self.sentinel_username, self.sentinel_password)

    def check_files(self) -> None:
        """Does nothing: connections through sentinels do not support TLS yet."""

    def _login_part(self) -> str:
        if self.username is None and self.password is None:
            return ""
        password = "" if self.password is None else f":{quote(self.password, safe='')}"
        return f"{quote(self.username or '', safe='')}{password}@"


def _parsed_sentinel_url(url: str) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """The hosts of one `sentinel://` URL, and its other values by their names in `Sentinels`."""
    found = _SENTINEL_URL.fullmatch(url)
    if found is None:
        raise ValueError(f"not a valid sentinel URL; write {SENTINEL_FORM}")
    query = dict(parse_qsl(found["query"] or "", keep_blank_values=True))
    if query.keys() - SENTINEL_OPTIONS:
        raise ValueError(
            "an option of the sentinel URL is not supported; supported options: "
            + ", ".join(SENTINEL_OPTIONS)
        )
    user, _, password = (found["login"] or "").partition(":")
    values = {
        "master": query.get("master") or query.get("master_name"),
        "db": _database(found["db"]),
        "username": unquote(user),
        "password": unquote(password),
        "sentinel_username": query.get("sentinel_username"),
        "sentinel_password": query.get("sentinel_password"),
    }
    hosts = [_parsed_host(text) for text in found["hosts"].split(",")]
    return hosts, {name: value for name, value in values.items() if value}


def _parsed_host(text: str) -> tuple[str, int]:
    found = _HOST.fullmatch(text.strip())
    if found is None or not 0 < int(found["port"] or SENTINEL_PORT) < 65_536:
        raise ValueError(f"write the sentinels as host:port,host:port, as in {SENTINEL_FORM}")
    return unquote(found["host"]).strip("[]"), int(found["port"] or SENTINEL_PORT)


def _database(text: str | None) -> str | None:
    if text and not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(
            f"the database must be a number, as in {SENTINEL_FORM}; write a / in a password as %2F"
        )
    return text


def _host_and_port(host: tuple[str, int]) -> str:
    name, port = host
    return f"[{name}]:{port}" if ":" in name else f"{quote(name)}:{port}"


def _login(username: str | None, password: str | None) -> dict[str, str]:
    login = {"username": username, "password": password}
    return {name: value for name, value in login.items() if value is not None}
