"""Redis URLs. The only place that takes the URL of one Redis server apart, and that spells it for others.

redis-py, kombu, Celery's result backend and Flower each understand other options of a URL, and ignore or
misread the rest. So none of them sees it: each gets what it takes, made from one `RedisAddress`. An option
that one of them could not follow is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, assert_never
from urllib.parse import parse_qsl, quote, unquote, urlencode

from openagents_worker.redis_tls import CertReqs, Tls
from openagents_worker.suggest import nearest

__all__ = ["CeleryAddress", "RedisAddress", "Scheme", "SHORTEST_SOCKET_TIMEOUT_S"]

SHORTEST_SOCKET_TIMEOUT_S = 2.0  # kombu's waiting for a message is answered after one second
LONGEST_SOCKET_PATH_BYTES = 107  # Linux takes no longer one; macOS 103
DEFAULT_HOST = "localhost"
DEFAULT_PORT = 6379

LOGIN_FORM = (
    "a reserved character of a password is percent-encoded: @ is %40, / %2F, : %3A, # %23, ? %3F, % %25"
)
ADDRESS_FORM = "host:6379, with an IPv6 address in brackets"
SOCKET_FORM = "unix://[user:password@]/path/of/the/socket?db=0"

_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[^:\[\]@]*)(?::(?P<port>[0-9]{0,5}))?")
_DATABASE = re.compile(r"[0-9]{1,9}")
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f]")
_CLIENT_NAME = re.compile(r"[!-~]+")
_OPTION_NAME = re.compile(r"[a-z_]{1,40}")


class Scheme(StrEnum):
    """What the URL of one Redis server begins with."""

    REDIS = "redis"
    REDISS = "rediss"
    UNIX = "unix"
    REDIS_SOCKET = "redis+socket"  # as Celery spells a Unix socket


class Option(StrEnum):
    """What may stand after the ? of a URL."""

    DB = "db"
    VIRTUAL_HOST = "virtual_host"  # as Celery spells the database of a Unix socket
    USERNAME = "username"
    PASSWORD = "password"  # noqa: S105 - the name of an option
    SOCKET_TIMEOUT = "socket_timeout"
    SOCKET_CONNECT_TIMEOUT = "socket_connect_timeout"
    HEALTH_CHECK_INTERVAL = "health_check_interval"
    PROTOCOL = "protocol"
    CLIENT_NAME = "client_name"
    SSL_CERT_REQS = "ssl_cert_reqs"
    SSL_CA_CERTS = "ssl_ca_certs"
    SSL_CERTFILE = "ssl_certfile"
    SSL_KEYFILE = "ssl_keyfile"
    SSL_PASSWORD = "ssl_password"  # noqa: S105 - as above
    SSL_CHECK_HOSTNAME = "ssl_check_hostname"
    SSL_CIPHERS = "ssl_ciphers"


@dataclass(frozen=True, slots=True)
class CeleryAddress:
    """A Redis as Celery takes it: a URL, and what stands beside it in the app's settings."""

    url: str = field(repr=False)
    use_ssl: Mapping[str, Any] | None = None
    """`broker_use_ssl` or `redis_backend_use_ssl`; None: without TLS."""
    transport_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """One Redis server, how to log in there, and what its connections are to be like.

    >>> RedisAddress.of("rediss://me:p%40ss@host/2?ssl_cert_reqs=CERT_NONE").db
    2
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    path: str | None = None
    """Of a Unix socket, where host and port mean nothing."""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    socket_timeout_s: float | None = None
    """The longest that anybody waits for an answer; None: as long as each needs."""
    socket_connect_timeout_s: float | None = None
    health_check_interval_s: int | None = None
    protocol: int | None = None
    client_name: str | None = None

    @classmethod
    def of(cls, url: str) -> RedisAddress:
        """Take a URL apart. Raises `ValueError`, whose text shows nothing of the URL but an option's name and
        a value that is no secret."""
        scheme, rest = _scheme_of(url.strip())
        if _UNPRINTABLE.search(rest):
            raise ValueError("it has a blank or a control character in it; a blank is %20")
        if "#" in rest:
            raise ValueError(f"it has a # in it; {LOGIN_FORM}")
        address, _, query = rest.partition("?")
        options = _options_of(query)
        _check_options(scheme, options)
        match scheme:
            case Scheme.REDIS | Scheme.REDISS:
                place = _at_port(address, options)
            case Scheme.UNIX | Scheme.REDIS_SOCKET:
                place = _at_socket(address, options)
            case _:
                assert_never(scheme)
        return cls(
            **place,
            tls=_tls_of(options) if scheme is Scheme.REDISS else None,
            socket_timeout_s=_seconds(options, Option.SOCKET_TIMEOUT, at_least=SHORTEST_SOCKET_TIMEOUT_S),
            socket_connect_timeout_s=_seconds(options, Option.SOCKET_CONNECT_TIMEOUT),
            health_check_interval_s=_whole_seconds(options, Option.HEALTH_CHECK_INTERVAL),
            protocol=_protocol(options),
            client_name=_client_name(options),
        )

    @property
    def url(self) -> str:
        """As a setting spells it, all options included."""
        options: dict[str, Any] = self._limits()
        if self.tls is not None:
            options = self.tls.url_options() | options
        if self.path is None:
            scheme = Scheme.REDIS if self.tls is None else Scheme.REDISS
            return f"{scheme}://{self._login()}{self._host_and_port()}/{self.db}{_query(options)}"
        return f"unix://{self._login()}{quote(self.path)}{_query({'db': self.db} | options)}"

    @property
    def is_at_port(self) -> bool:
        """Whether it is reached by TCP, and not by a Unix socket."""
        return self.path is None

    def check_files(self) -> None:
        """Raises `ValueError` that names the option whose file cannot be used. Reads them: not on a loop."""
        if self.tls is not None:
            self.tls.check_files()

    def redis_options(self) -> dict[str, Any]:
        """Where to connect to and how to log in, as redis-py's connections take it."""
        place = {"host": self.host, "port": self.port} if self.path is None else {"path": self.path}
        login = {"username": self.username, "password": self.password, "protocol": self.protocol}
        options = {
            **place,
            "db": self.db,
            **{name: value for name, value in login.items() if value is not None},
        }
        return options if self.tls is None else options | self.tls.redis_options()

    def as_broker(self) -> CeleryAddress:
        """For `broker_url`, `broker_use_ssl` and `broker_transport_options`.

        Raises `ValueError` where kombu could not follow: it speaks RESP3 wherever redis-py does.
        """
        options = self._limits()
        if options.pop("protocol", None) == 2:
            raise ValueError(
                "a Redis with protocol=2 cannot be Celery's broker, which always speaks RESP3: "
                "name another one, or leave the option out"
            )
        return CeleryAddress(self._celery_url({}), self._use_ssl(), options)

    def as_backend(self) -> CeleryAddress:
        """For `result_backend` and `redis_backend_use_ssl`; its limits stand in the URL."""
        return CeleryAddress(self._celery_url(self._limits()), self._use_ssl())

    def _celery_url(self, options: Mapping[str, Any]) -> str:
        if self.path is not None:
            socket = {"virtual_host": self.db, **options}
            return f"redis+socket://{self._login()}{quote(self.path)}{_query(socket)}"
        scheme = Scheme.REDIS if self.tls is None else Scheme.REDISS
        return f"{scheme}://{self._login()}{self._host_and_port()}/{self.db}{_query(options)}"

    def _use_ssl(self) -> Mapping[str, Any] | None:
        return None if self.tls is None else self.tls.redis_options()

    def _limits(self) -> dict[str, Any]:
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


# --- the parts of a URL ----------------------------------------------------------------------------------


def _scheme_of(url: str) -> tuple[Scheme, str]:
    name, is_url, rest = url.partition("://")
    try:
        scheme = Scheme(name.lower()) if is_url else None
    except ValueError:
        scheme = None
    if scheme is None:
        schemes = ", ".join(f"{scheme}://" for scheme in (*Scheme, "sentinel"))
        raise ValueError(f"not a Redis URL; it begins with {schemes}")
    return scheme, rest


def _at_port(address: str, options: Mapping[Option, str]) -> dict[str, Any]:
    authority, _, path = address.partition("/")
    if "@" in path:
        raise ValueError(f"it has a / in its login; {LOGIN_FORM}")
    login, has_login, place = authority.rpartition("@")
    found = _AUTHORITY.fullmatch(place)
    port = int((found and found["port"]) or DEFAULT_PORT)
    if found is None or not 0 < port < 65_536:
        raise ValueError(f"its host and port are written {ADDRESS_FORM}; {LOGIN_FORM}")
    return {
        "host": _decoded(found["host"]).strip("[]") or DEFAULT_HOST,
        "port": port,
        "db": _database(path.rstrip("/"), options, Option.DB),
        **_login_of(login if has_login else "", options),
    }


def _at_socket(address: str, options: Mapping[Option, str]) -> dict[str, Any]:
    authority, slash, path = address.partition("/")
    login, has_login, host = authority.rpartition("@")
    if host or not path:
        raise ValueError(f"the path of its socket begins with a /, as in {SOCKET_FORM}; {LOGIN_FORM}")
    decoded = _decoded(slash + path)
    if len(decoded.encode()) > LONGEST_SOCKET_PATH_BYTES:
        raise ValueError(f"the path of its socket has more than {LONGEST_SOCKET_PATH_BYTES} bytes")
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
                raise ValueError(f"its {option} stands before the @ and after the ?; leave one of them out")
            found[option.value] = options[option] or None
    return found


def _database(text: str, options: Mapping[Option, str], option: Option) -> int:
    """The database, which a URL names in its path or as an option."""
    given = [each for each in (text, options.get(option, "")) if each]
    if not all(_DATABASE.fullmatch(each) for each in given):
        raise ValueError(f"its database is a number, as in redis://host:6379/0 and {SOCKET_FORM}")
    numbers = {int(each) for each in given}
    if len(numbers) > 1:
        raise ValueError("it names two databases; leave one of them out")
    return numbers.pop() if numbers else 0


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("what is percent-encoded in it is not UTF-8") from None


# --- options ---------------------------------------------------------------------------------------------


def _options_of(query: str) -> dict[Option, str]:
    if "@" in query:
        raise ValueError(f"it has an @ after a ?; {LOGIN_FORM}")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError:
        raise ValueError("its options are written ?name=value&name=value, percent-encoded as UTF-8") from None
    options: dict[Option, str] = {}
    for name, value in pairs:
        option = _option(name)
        if options.setdefault(option, value) != value:
            raise ValueError(f"its option {option} is given twice")
    return options


def _option(name: str) -> Option:
    known: list[str] = list(Option)
    if name in known:
        return Option(name)
    shown = (
        f"its option {name} is not one" if _OPTION_NAME.fullmatch(name) else "one of its options is not one"
    )
    if name == "ssl":
        raise ValueError("its option ssl is not one that is read here: a URL with TLS begins with rediss://")
    near = nearest(name, known)
    guess = f"did you mean {near}? " if near else ""
    raise ValueError(
        f"{shown} that every part of a deployment can follow; {guess}there are {', '.join(known)}"
    )


def _check_options(scheme: Scheme, options: Mapping[Option, str]) -> None:
    """Raises `ValueError` for an option that would be ignored with this scheme."""
    for option in options:
        if option.startswith("ssl_") and scheme is not Scheme.REDISS:
            raise ValueError(f"its option {option} is for TLS: such a URL begins with rediss://")
        is_socket = scheme in (Scheme.UNIX, Scheme.REDIS_SOCKET)
        if option is Option.VIRTUAL_HOST and not is_socket:
            raise ValueError("its option virtual_host is for Unix sockets; write redis://host:6379/0")
        if option is Option.SOCKET_CONNECT_TIMEOUT and is_socket:
            raise ValueError("its option socket_connect_timeout means nothing at a Unix socket")
        if not options[option] and option not in (Option.USERNAME, Option.PASSWORD):
            raise ValueError(f"its option {option} is empty")


def _tls_of(options: Mapping[Option, str]) -> Tls:
    cert_reqs = _cert_reqs(options)
    is_checked = cert_reqs is not CertReqs.NONE
    check_hostname = _flag(options, Option.SSL_CHECK_HOSTNAME, default=is_checked)
    if check_hostname and not is_checked:
        raise ValueError("its option ssl_check_hostname=true needs a certificate: ssl_cert_reqs=required")
    if Option.SSL_KEYFILE in options and Option.SSL_CERTFILE not in options:
        raise ValueError("its option ssl_keyfile needs the certificate of that key: ssl_certfile")
    if Option.SSL_PASSWORD in options and Option.SSL_CERTFILE not in options:
        raise ValueError("its option ssl_password is that of a key: it needs ssl_certfile and ssl_keyfile")
    return Tls(
        cert_reqs=cert_reqs,
        check_hostname=check_hostname,
        ca_certs=options.get(Option.SSL_CA_CERTS),
        certfile=options.get(Option.SSL_CERTFILE),
        keyfile=options.get(Option.SSL_KEYFILE, options.get(Option.SSL_CERTFILE)),  # one file may hold both
        key_password=options.get(Option.SSL_PASSWORD),
        ciphers=options.get(Option.SSL_CIPHERS),
    )


def _cert_reqs(options: Mapping[Option, str]) -> CertReqs:
    text = options.get(Option.SSL_CERT_REQS, CertReqs.REQUIRED)
    try:
        return CertReqs(text.lower().removeprefix("cert_"))
    except ValueError:
        raise _wrong(Option.SSL_CERT_REQS, text, "required, optional or none (or CERT_REQUIRED …)") from None


def _flag(options: Mapping[Option, str], option: Option, *, default: bool) -> bool:
    text = options.get(option, str(default)).lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise _wrong(option, text, "true or false")


def _seconds(options: Mapping[Option, str], option: Option, *, at_least: float = 0.1) -> float | None:
    if option not in options:
        return None
    try:
        seconds = float(options[option])
    except ValueError:
        seconds = math.nan
    if not at_least <= seconds < math.inf:
        raise _wrong(option, options[option], f"a number of seconds, at least {at_least:g}")
    return seconds


def _whole_seconds(options: Mapping[Option, str], option: Option) -> int | None:
    if option not in options:
        return None
    if not _DATABASE.fullmatch(options[option]) or not int(options[option]):
        raise _wrong(option, options[option], "a whole number of seconds, at least 1")
    return int(options[option])


def _protocol(options: Mapping[Option, str]) -> int | None:
    if Option.PROTOCOL not in options:
        return None
    if options[Option.PROTOCOL] not in ("2", "3"):
        raise _wrong(Option.PROTOCOL, options[Option.PROTOCOL], "2 or 3")
    return int(options[Option.PROTOCOL])


def _client_name(options: Mapping[Option, str]) -> str | None:
    name = options.get(Option.CLIENT_NAME)
    if name is not None and not _CLIENT_NAME.fullmatch(name):  # Redis refuses others
        raise _wrong(Option.CLIENT_NAME, name, "one word of ASCII characters")
    return name


def _wrong(option: Option, value: str, right: str) -> ValueError:
    return ValueError(f"its option {option} is {right}; found {value[:60]!r}")
