"""One Redis server. The only place that parses its URL and writes its address for other libraries.

redis-py, kombu, Celery's result backend and Flower each support different URL options, and ignore or misread
the rest. Therefore none of them gets the user's URL: each gets settings made from one `RedisAddress`. An
option that one of them does not support is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, assert_never
from urllib.parse import quote, unquote, urlencode

from openagents_worker.redis_tls import Tls
from openagents_worker.redis_url.options import (
    LOGIN_FORM,
    Option,
    Scheme,
    check_options,
    connection_fields_of,
    options_of,
    tls_of,
)

__all__ = ["CeleryAddress", "RedisAddress"]

LONGEST_SOCKET_PATH_BYTES = 107  # the limit of Linux; macOS allows 103
DEFAULT_HOST = "localhost"
DEFAULT_PORT = 6379

ADDRESS_FORM = "host:6379, with an IPv6 address in brackets"
SOCKET_FORM = "unix://[user:password@]/path/of/the/socket?db=0"

_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[^:\[\]@]*)(?::(?P<port>[0-9]{0,5}))?")
_DATABASE = re.compile(r"[0-9]{1,9}")
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f]")


@dataclass(frozen=True, slots=True)
class CeleryAddress:
    """A Redis server in the form that Celery needs: a URL and the related settings of the app."""

    url: str = field(repr=False)
    use_ssl: Mapping[str, Any] | None = None
    """The value of `broker_use_ssl` or `redis_backend_use_ssl`. None: without TLS."""
    transport_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """One Redis server: its address, the login and the connection options.

    >>> RedisAddress.of("rediss://me:p%40ss@host/2?ssl_cert_reqs=CERT_NONE").db
    2
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    path: str | None = None
    """The path of a Unix socket. If it is set, host and port are not used."""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    socket_timeout_s: float | None = None
    """The longest time to wait for an answer. None: each client uses its own limit."""
    socket_connect_timeout_s: float | None = None
    health_check_interval_s: int | None = None
    protocol: int | None = None
    client_name: str | None = None

    @classmethod
    def of(cls, url: str) -> RedisAddress:
        """Parse a URL. Raises `ValueError`. Its text contains only option names and values that are not
        secrets, never the URL itself."""
        scheme, rest = _scheme_of(url.strip())
        if _UNPRINTABLE.search(rest):
            raise ValueError("the URL contains a space or a control character; write a space as %20")
        if "#" in rest:
            raise ValueError(f"the URL contains a #; {LOGIN_FORM}")
        address, _, query = rest.partition("?")
        options = options_of(query)
        check_options(scheme, options)
        match scheme:
            case Scheme.REDIS | Scheme.REDISS:
                location = _server_at_port(address, options)
            case Scheme.UNIX | Scheme.REDIS_SOCKET:
                location = _server_at_socket(address, options)
            case _:
                assert_never(scheme)
        return cls(
            **location,
            tls=tls_of(options) if scheme is Scheme.REDISS else None,
            **connection_fields_of(options),
        )

    @property
    def url(self) -> str:
        """The address as a URL for the settings of this library, with all options."""
        options: dict[str, Any] = self._connection_options()
        if self.tls is not None:
            options = self.tls.url_options() | options
        if self.path is None:
            scheme = Scheme.REDIS if self.tls is None else Scheme.REDISS
            return f"{scheme}://{self._login()}{self._host_and_port()}/{self.db}{_query(options)}"
        return f"unix://{self._login()}{quote(self.path)}{_query({'db': self.db} | options)}"

    @property
    def is_at_port(self) -> bool:
        """Whether the server is reached by TCP, not by a Unix socket."""
        return self.path is None

    def check_files(self) -> None:
        """Raises `ValueError` with the option whose file cannot be used.

        It reads files: do not call it on an event loop.
        """
        if self.tls is not None:
            self.tls.check_files()

    def redis_options(self) -> dict[str, Any]:
        """The address, login and TLS options as arguments of redis-py's connections."""
        location = {"host": self.host, "port": self.port} if self.path is None else {"path": self.path}
        login = {"username": self.username, "password": self.password, "protocol": self.protocol}
        options = {
            **location,
            "db": self.db,
            **{name: value for name, value in login.items() if value is not None},
        }
        return options if self.tls is None else options | self.tls.redis_options()

    def as_broker(self) -> CeleryAddress:
        """The values of `broker_url`, `broker_use_ssl` and `broker_transport_options`.

        Raises `ValueError` for `protocol=2`: kombu has no option for it.
        """
        options = self._connection_options()
        if options.pop("protocol", None) == 2:
            raise ValueError(
                "a Redis with protocol=2 cannot be Celery's broker, because Celery always uses RESP3: "
                "use another Redis, or remove the option"
            )
        return CeleryAddress(self._celery_url({}), self._use_ssl(), options)

    def as_backend(self) -> CeleryAddress:
        """The values of `result_backend` and `redis_backend_use_ssl`; the limits are options of the URL."""
        return CeleryAddress(self._celery_url(self._connection_options()), self._use_ssl())

    def _celery_url(self, options: Mapping[str, Any]) -> str:
        if self.path is not None:
            socket = {"virtual_host": self.db, **options}
            return f"redis+socket://{self._login()}{quote(self.path)}{_query(socket)}"
        scheme = Scheme.REDIS if self.tls is None else Scheme.REDISS
        return f"{scheme}://{self._login()}{self._host_and_port()}/{self.db}{_query(options)}"

    def _use_ssl(self) -> Mapping[str, Any] | None:
        return None if self.tls is None else self.tls.redis_options()

    def _connection_options(self) -> dict[str, Any]:
        limits = {
            "socket_timeout": self.socket_timeout_s,
            "socket_connect_timeout": self.socket_connect_timeout_s,
            "health_check_interval": self.health_check_interval_s,
            "protocol": self.protocol,
            "client_name": self.client_name,
        }
        return {name: value for name, value in limits.items() if value is not None}

    def _login(self) -> str:
        if self.username is None and self.password is None:
            return ""
        password = "" if self.password is None else f":{quote(self.password, safe='')}"
        return f"{quote(self.username or '', safe='')}{password}@"

    def _host_and_port(self) -> str:
        if ":" in self.host:
            return f"[{quote(self.host, safe=':')}]:{self.port}"
        return f"{quote(self.host)}:{self.port}"


def _query(options: Mapping[str, Any]) -> str:
    return f"?{urlencode(options, quote_via=quote)}" if options else ""


def _scheme_of(url: str) -> tuple[Scheme, str]:
    """The scheme of the URL, and the rest after `://`. Raises `ValueError`."""
    name, is_url, rest = url.partition("://")
    try:
        scheme = Scheme(name.lower()) if is_url else None
    except ValueError:
        scheme = None
    if scheme is None:
        schemes = ", ".join(f"{scheme}://" for scheme in Scheme)
        raise ValueError(f"not a valid Redis URL; it must begin with {schemes} or sentinel://")
    return scheme, rest


def _server_at_port(address: str, options: Mapping[Option, str]) -> dict[str, Any]:
    """The fields of `RedisAddress` for a server at a host and port. Raises `ValueError`."""
    authority, _, path = address.partition("/")
    if "@" in path:
        raise ValueError(f"the login contains a /; {LOGIN_FORM}")
    login, has_login, host_and_port = authority.rpartition("@")
    found = _AUTHORITY.fullmatch(host_and_port)
    port = int((found and found["port"]) or DEFAULT_PORT)
    if found is None or not 0 < port < 65_536:
        raise ValueError(f"the host and port are not valid; write {ADDRESS_FORM}; {LOGIN_FORM}")
    return {
        "host": _decoded(found["host"]).strip("[]") or DEFAULT_HOST,
        "port": port,
        "db": _database(path.rstrip("/"), options, Option.DB),
        **_login_of(login if has_login else "", options),
    }


def _server_at_socket(address: str, options: Mapping[Option, str]) -> dict[str, Any]:
    """The fields of `RedisAddress` for a server at a Unix socket. Raises `ValueError`."""
    authority, slash, path = address.partition("/")
    login, has_login, host = authority.rpartition("@")
    if host or not path:
        raise ValueError(f"the socket path must begin with a /, as in {SOCKET_FORM}; {LOGIN_FORM}")
    decoded = _decoded(slash + path)
    if len(decoded.encode()) > LONGEST_SOCKET_PATH_BYTES:
        raise ValueError(f"the socket path is longer than {LONGEST_SOCKET_PATH_BYTES} bytes")
    return {
        "path": decoded,
        "db": _database(options.get(Option.VIRTUAL_HOST, ""), options, Option.DB),
        **_login_of(login if has_login else "", options),
    }


def _login_of(login: str, options: Mapping[Option, str]) -> dict[str, str | None]:
    user, _, password = login.partition(":")
    found = {"username": _decoded(user) or None, "password": _decoded(password) or None}
    for option in (Option.USERNAME, Option.PASSWORD):
        if option in options:
            if found[option.value] is not None:
                raise ValueError(f"the URL has a {option} before the @ and after the ?; remove one of them")
            found[option.value] = options[option] or None
    return found


def _database(text: str, options: Mapping[Option, str], option: Option) -> int:
    """The number of the database, from the path of the URL or from an option; 0 without either."""
    databases = [value for value in (text, options.get(option, "")) if value]
    if not all(_DATABASE.fullmatch(value) for value in databases):
        raise ValueError(f"the database must be a number, as in redis://host:6379/0 and {SOCKET_FORM}")
    numbers = {int(value) for value in databases}
    if len(numbers) > 1:
        raise ValueError("the URL contains two different databases; remove one of them")
    return numbers.pop() if numbers else 0


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("the percent-encoded text in the URL is not valid UTF-8") from None
