"""TLS that was not agreed upon. The only place that says why, and whether a server speaks TLS at all."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

from redis import exceptions

from openagents_worker.redis_tls import Tls

__all__ = ["TlsProblem", "alert_of", "is_hung_up_on", "speaks_redis", "speaks_tls", "tls_problem_of"]


@dataclass(frozen=True, slots=True)
class TlsProblem:
    """What is wrong with a certificate, a key or a URL, where repeating will not help, and what to do."""

    what: str
    hint: str


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those from which it came."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


_ALERTS_FOR_US = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "ACCESS_DENIED")
"""Parts of the names of TLS alerts by which a server refuses what we have shown of ourselves, or have not."""

_NO_TLS_THERE = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE", "HTTP_REQUEST")


def tls_problem_of(error: BaseException) -> TlsProblem | None:
    """What is wrong with TLS and what to do; None when nothing is, or when it may heal by itself."""
    for one in _chain(error):
        if isinstance(one, ssl.SSLCertVerificationError):
            return TlsProblem(
                f"its certificate is not accepted: {one.verify_message}", _hint_on_certificate(one)
            )
        if isinstance(one, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return None  # the connection ended, which is no word about TLS
        if isinstance(one, ssl.SSLError) and one.reason:
            return TlsProblem(one.reason.lower().replace("_", " "), _hint_on_alert(one.reason))
    return None


_VERIFY_EXPIRED = (9, 10)  # as OpenSSL numbers what it finds wrong: not yet valid, expired
_VERIFY_OTHER_NAME = (62, 64)  # of the host, of the IP address


def _hint_on_certificate(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _VERIFY_EXPIRED:
        return "renew the certificate of the server, and look at the clocks of both machines"
    if error.verify_code in _VERIFY_OTHER_NAME:
        return (
            "TLS: the certificate is for another name than the host in the URL: write that name, "
            "or ssl_check_hostname=false"
        )
    return "TLS: name the file of the CA that signed it in the URL: ssl_ca_certs=/path/ca.pem"


def _hint_on_alert(reason: str) -> str:
    if any(part in reason for part in _NO_TLS_THERE):
        return "what answers there does not speak TLS: is it the port for TLS? without TLS a URL begins with redis://"
    if "ALERT" in reason and any(part in reason for part in _ALERTS_FOR_US):
        return (
            "TLS: the server wants another certificate of ours: ssl_certfile=/path/client.pem and "
            "ssl_keyfile=/path/client.key in the URL"
        )
    return "TLS: look at the options ssl_… of the URL, and at the versions and ciphers that the server allows"


_ENDED = (
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
    asyncio.IncompleteReadError,
    exceptions.InvalidResponse,
)


def is_hung_up_on(error: BaseException) -> bool:
    """Whether somebody was there, and ended the connection instead of answering on it."""
    return any(
        (isinstance(one, OSError) and one.errno in (errno.ECONNRESET, errno.EPIPE))
        or isinstance(one, _ENDED)
        or (isinstance(one, exceptions.ConnectionError) and "closed by server" in str(one))
        for one in _chain(error)
    )


def speaks_tls(host: str, port: int, *, timeout_s: float) -> bool:
    """Whether what answers there begins TLS, whoever it is. Waits for it: not on a loop."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # it has refused us in the words of TLS
    except OSError:
        return False


def alert_of(tls: Tls, host: str, port: int, *, timeout_s: float) -> TlsProblem | None:
    """What a server says against us after the handshake, which is when it has seen our certificate, or none.

    Who has asked for something by then, as a client does, may find the connection reset and never read it.
    None: it says nothing, as a Redis does that waits for a command. Waits for it: not on a loop.
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
    """Whether a Redis without TLS answers there, also one that wants a login. Waits for it: not on a loop."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as plain:
            plain.sendall(b"PING\r\n")
            return plain.recv(1) in (b"+", b"-")
    except OSError:
        return False
