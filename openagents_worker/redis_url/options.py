"""Options of Redis URLs. The only place that parses what follows the ? of the URL of one Redis server."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any
from urllib.parse import parse_qsl

from openagents_worker.redis_tls import CertReqs, Tls
from openagents_worker.suggest import nearest

__all__ = [
    "LOGIN_FORM",
    "SHORTEST_SOCKET_TIMEOUT_S",
    "Option",
    "Scheme",
    "check_options",
    "connection_fields_of",
    "options_of",
    "tls_of",
]

SHORTEST_SOCKET_TIMEOUT_S = 2.0  # kombu's blocking read of a message is answered after one second
LOGIN_FORM = (
    "percent-encode reserved characters of a password: @ as %40, / as %2F, : as %3A, # as %23, ? as %3F, "
    "% as %25"
)

_NUMBER = re.compile(r"[0-9]{1,9}")
_CLIENT_NAME = re.compile(r"[!-~]+")
_OPTION_NAME = re.compile(r"[a-z_]{1,40}")


class Scheme(StrEnum):
    """The schemes of a URL of one Redis server."""

    REDIS = "redis"
    REDISS = "rediss"
    UNIX = "unix"
    REDIS_SOCKET = "redis+socket"  # Celery's scheme for a Unix socket


class Option(StrEnum):
    """The supported options after the ? of a URL."""

    DB = "db"
    VIRTUAL_HOST = "virtual_host"  # Celery's name for the database of a Unix socket
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


def options_of(query: str) -> dict[Option, str]:
    """The options after the ? of a URL. Raises `ValueError`."""
    if "@" in query:
        raise ValueError(f"the URL contains an @ after the ?; {LOGIN_FORM}")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError:
        raise ValueError(
            "the options are not valid; write ?name=value&name=value, percent-encoded as UTF-8"
        ) from None
    options: dict[Option, str] = {}
    for name, value in pairs:
        option = _option(name)
        if options.setdefault(option, value) != value:
            raise ValueError(f"the option {option} is given twice with different values")
    return options


def _option(name: str) -> Option:
    known: list[str] = list(Option)
    if name in known:
        return Option(name)
    shown_name = f"the option {name}" if _OPTION_NAME.fullmatch(name) else "one of the options"
    if name == "ssl":
        raise ValueError("the option ssl is not supported: a URL with TLS begins with rediss://")
    near = nearest(name, known)
    guess = f"did you mean {near}? " if near else ""
    raise ValueError(f"{shown_name} is not supported; {guess}supported options: {', '.join(known)}")


def check_options(scheme: Scheme, options: Mapping[Option, str]) -> None:
    """Raises `ValueError` for an option that would be ignored with this scheme."""
    for option in options:
        if option.startswith("ssl_") and scheme is not Scheme.REDISS:
            raise ValueError(f"the option {option} requires TLS: a URL with TLS begins with rediss://")
        is_socket = scheme in (Scheme.UNIX, Scheme.REDIS_SOCKET)
        if option is Option.VIRTUAL_HOST and not is_socket:
            raise ValueError("the option virtual_host is only for Unix sockets; write redis://host:6379/0")
        if option is Option.SOCKET_CONNECT_TIMEOUT and is_socket:
            raise ValueError("the option socket_connect_timeout has no effect on a Unix socket; remove it")
        if not options[option] and option not in (Option.USERNAME, Option.PASSWORD):
            raise ValueError(f"the option {option} is empty")


def tls_of(options: Mapping[Option, str]) -> Tls:
    cert_reqs = _cert_reqs(options)
    is_checked = cert_reqs is not CertReqs.NONE
    check_hostname = _flag(options, Option.SSL_CHECK_HOSTNAME, default=is_checked)
    if check_hostname and not is_checked:
        raise ValueError("the option ssl_check_hostname=true requires ssl_cert_reqs=required")
    if Option.SSL_KEYFILE in options and Option.SSL_CERTFILE not in options:
        raise ValueError("the option ssl_keyfile requires ssl_certfile, the certificate of that key")
    if Option.SSL_PASSWORD in options and Option.SSL_CERTFILE not in options:
        raise ValueError("the option ssl_password requires ssl_certfile and ssl_keyfile")
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
        raise _wrong_value(
            Option.SSL_CERT_REQS, text, "required, optional or none (or CERT_REQUIRED …)"
        ) from None


def _flag(options: Mapping[Option, str], option: Option, *, default: bool) -> bool:
    text = options.get(option, str(default)).lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise _wrong_value(option, text, "true or false")


def connection_fields_of(options: Mapping[Option, str]) -> dict[str, Any]:
    """The fields of `RedisAddress` for timeouts, protocol and client name. Raises `ValueError`."""
    return {
        "socket_timeout_s": _seconds(options, Option.SOCKET_TIMEOUT, at_least=SHORTEST_SOCKET_TIMEOUT_S),
        "socket_connect_timeout_s": _seconds(options, Option.SOCKET_CONNECT_TIMEOUT),
        "health_check_interval_s": _whole_seconds(options, Option.HEALTH_CHECK_INTERVAL),
        "protocol": _protocol(options),
        "client_name": _client_name(options),
    }


def _seconds(options: Mapping[Option, str], option: Option, *, at_least: float = 0.1) -> float | None:
    if option not in options:
        return None
    try:
        seconds = float(options[option])
    except ValueError:
        seconds = math.nan
    if not at_least <= seconds < math.inf:
        raise _wrong_value(option, options[option], f"a number of seconds, at least {at_least:g}")
    return seconds


def _whole_seconds(options: Mapping[Option, str], option: Option) -> int | None:
    if option not in options:
        return None
    if not _NUMBER.fullmatch(options[option]) or not int(options[option]):
        raise _wrong_value(option, options[option], "a whole number of seconds, at least 1")
    return int(options[option])


def _protocol(options: Mapping[Option, str]) -> int | None:
    if Option.PROTOCOL not in options:
        return None
    if options[Option.PROTOCOL] not in ("2", "3"):
        raise _wrong_value(Option.PROTOCOL, options[Option.PROTOCOL], "2 or 3")
    return int(options[Option.PROTOCOL])


def _client_name(options: Mapping[Option, str]) -> str | None:
    name = options.get(Option.CLIENT_NAME)
    if name is not None and not _CLIENT_NAME.fullmatch(name):  # Redis refuses others
        raise _wrong_value(Option.CLIENT_NAME, name, "one word of ASCII characters")
    return name


def _wrong_value(option: Option, value: str, expected: str) -> ValueError:
    return ValueError(f"the option {option} must be {expected}; found {value[:60]!r}")
