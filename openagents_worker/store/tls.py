"""TLS problems: the only place that finds out why a TLS handshake failed, and whether a server uses TLS."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

from redis import exceptions

from openagents_worker.redis_tls import Tls

__all__ = ["TlsProblem", "tls_alert", "server_hung_up", "speaks_redis", "speaks_tls", "tls_problem_of"]


@dataclass(frozen=True, slots=True)
class TlsProblem:
    """A lasting problem with a certificate, a key or a URL (`what`), and how to solve it (`hint`)."""

    what: str
    hint: str


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, innermost last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


_ALERTS_ABOUT_CLIENT = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "ACCESS_DENIED")
"""Parts of the names of the TLS alerts with which a server rejects our certificate, or its absence."""

_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE", "HTTP_REQUEST")


def tls_problem_of(error: BaseException) -> TlsProblem | None:
    """The TLS problem that caused this error. None if TLS is not the cause, or if a retry may help."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return TlsProblem(
                f"the certificate of the server is not accepted: {cause.verify_message}",
                _hint_on_certificate(cause),
            )
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return None  # the connection ended, which says nothing about TLS
        if isinstance(cause, ssl.SSLError) and cause.reason:
            return TlsProblem(cause.reason.lower().replace("_", " "), _hint_on_alert(cause.reason))
    return None


_VERIFY_EXPIRED = (9, 10)  # error numbers of OpenSSL: not yet valid, expired
_VERIFY_OTHER_NAME = (62, 64)  # wrong name of the host, wrong IP address


def _hint_on_certificate(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _VERIFY_EXPIRED:
        return "renew the certificate of the server, and check the clocks of both machines"
    if error.verify_code in _VERIFY_OTHER_NAME:
        return (
            "TLS: the certificate has another name than the host in the URL: use this name in the URL, "
            "or add ssl_check_hostname=false"
        )
    return "TLS: add the file of the CA that signed the certificate to the URL: ssl_ca_certs=/path/ca.pem"


def _hint_on_alert(reason: str) -> str:
    if any(part in reason for part in _NOT_TLS):
        return (
            "the server does not use TLS at this port: use its TLS port, or a URL that begins with redis:// "
            "(without TLS)"
        )
    if "ALERT" in reason and any(part in reason for part in _ALERTS_ABOUT_CLIENT):
        return (
            "TLS: the server requires another client certificate: add ssl_certfile=/path/client.pem and "
            "ssl_keyfile=/path/client.key to the URL"
        )
    return "TLS: check the options ssl_… of the URL, and the versions and ciphers that the server allows"


_HANG_UP_ERRORS = (
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
    asyncio.IncompleteReadError,
    exceptions.InvalidResponse,
)


def server_hung_up(error: BaseException) -> bool:
    """Whether the server accepted the connection, then closed it instead of answering."""
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ECONNRESET, errno.EPIPE))
        or isinstance(cause, _HANG_UP_ERRORS)
        or (isinstance(cause, exceptions.ConnectionError) and "closed by server" in str(cause))
        for cause in _causes(error)
    )


def speaks_tls(host: str, port: int, *, timeout_s: float) -> bool:
    """Whether the server at this address answers with TLS. Blocks: do not call it on an event loop."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # the server rejected us with a TLS alert
    except OSError:
        return False


def tls_alert(tls: Tls, host: str, port: int, *, timeout_s: float) -> TlsProblem | None:
    """The TLS alert of a server after the handshake, for example because it rejects our certificate.

    A client that has already sent a command may get a reset instead of the alert. None: the server sends
    nothing, as a Redis that waits for a command. Blocks: do not call it on an event loop.
    """
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as plain,
            tls.context().wrap_socket(plain, server_hostname=host) as connection,
        ):
            connection.recv(1)
    except (OSError, ValueError) as error:
        return tls_problem_of(error)
    return None


def speaks_redis(host: str, port: int, *, timeout_s: float) -> bool:
    """Whether a Redis without TLS answers at this address, even if it requires a login.

    Blocks: do not call it on an event loop.
    """
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as plain:
            plain.sendall(b"PING\r\n")
            return plain.recv(1) in (b"+", b"-")
    except OSError:
        return False
