"""How a Redis is addressed. The table of the URLs that must work everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from tests.tls.servers import PASSWORD, USER, Servers

__all__ = ["VARIANTS", "Variant"]

LIMITS = "protocol=3&socket_timeout=5&socket_connect_timeout=2&health_check_interval=7&client_name=the-shop"
SOCKET_LIMITS = "protocol=3&socket_timeout=5&health_check_interval=7&client_name=the-shop"


@dataclass(frozen=True)
class Variant:
    """A URL, and the server and database that it means."""

    url: Callable[[Servers], str]
    db: int = 0
    is_locked: bool = False


def _at(path: object) -> str:
    return quote(str(path))


def _ca(s: Servers) -> str:
    return f"ssl_ca_certs={_at(s.certificates.ca_file)}"


def _client(s: Servers, key: str) -> str:
    folder = s.certificates.folder
    return f"ssl_certfile={_at(folder / 'client.crt')}&ssl_keyfile={_at(folder / key)}"


def _word(text: str) -> str:
    return quote(text, safe="")


VARIANTS = {
    "a database in the path": Variant(lambda s: f"redis://127.0.0.1:{s.free.port}/3", 3),
    "a database as an option": Variant(lambda s: f"redis://127.0.0.1:{s.free.port}?db=3", 3),
    "a name": Variant(lambda s: f"redis://LOCALHOST:{s.free.port}/"),
    "IPv6": Variant(lambda s: f"redis://[::1]:{s.free.port}/2", 2),
    "a password": Variant(
        lambda s: f"redis://:{_word(PASSWORD)}@127.0.0.1:{s.locked.port}/1", 1, is_locked=True
    ),
    "a user": Variant(lambda s: f"redis://{s.login}@127.0.0.1:{s.locked.port}/1", 1, is_locked=True),
    "a login as options": Variant(
        lambda s: f"redis://127.0.0.1:{s.locked.port}/0?username={_word(USER)}&password={_word(PASSWORD)}",
        is_locked=True,
    ),
    "limits": Variant(lambda s: f"redis://127.0.0.1:{s.free.port}/1?{LIMITS}", 1),
    "a socket": Variant(lambda s: f"unix://{_at(s.socket)}?db=2", 2),
    "a socket with a user": Variant(
        lambda s: f"unix://{s.login}@{_at(s.locked_socket)}?db=1&{SOCKET_LIMITS}", 1, is_locked=True
    ),
    "a socket as Celery spells it": Variant(
        lambda s: f"redis+socket://:{_word(PASSWORD)}@{_at(s.locked_socket)}?virtual_host=3",
        3,
        is_locked=True,
    ),
    "TLS": Variant(lambda s: f"rediss://localhost:{s.tls.port}/1?{_ca(s)}", 1),
    "TLS, required": Variant(
        lambda s: f"rediss://127.0.0.1:{s.tls.port}/0?ssl_cert_reqs=required&ssl_check_hostname=true&{_ca(s)}"
    ),
    "TLS, CERT_REQUIRED": Variant(
        lambda s: f"rediss://localhost:{s.tls.port}/0?ssl_cert_reqs=CERT_REQUIRED&{_ca(s)}"
    ),
    "TLS, optional": Variant(lambda s: f"rediss://localhost:{s.tls.port}/0?ssl_cert_reqs=optional&{_ca(s)}"),
    "TLS, none": Variant(lambda s: f"rediss://localhost:{s.tls.port}/0?ssl_cert_reqs=none"),
    "TLS, CERT_NONE": Variant(lambda s: f"rediss://localhost:{s.tls_expired.port}/0?ssl_cert_reqs=CERT_NONE"),
    "TLS, another name": Variant(
        lambda s: f"rediss://localhost:{s.tls_other_name.port}/0?ssl_check_hostname=false&{_ca(s)}"
    ),
    "TLS over IPv6": Variant(lambda s: f"rediss://[::1]:{s.tls_6.port}/2?{_ca(s)}", 2),
    "TLS with limits": Variant(
        lambda s: f"rediss://localhost:{s.tls.port}/0?{_ca(s)}&ssl_ciphers=ECDHE%2BAESGCM&{LIMITS}"
    ),
    "TLS with a user": Variant(
        lambda s: f"rediss://{s.login}@localhost:{s.tls_locked.port}/1?{_ca(s)}", 1, is_locked=True
    ),
    "mutual TLS": Variant(
        lambda s: f"rediss://{s.login}@localhost:{s.tls_mutual.port}/1?{_ca(s)}&{_client(s, 'client.key')}",
        1,
        is_locked=True,
    ),
    "mutual TLS, one file": Variant(
        lambda s: (
            f"rediss://{s.login}@localhost:{s.tls_mutual.port}/1?{_ca(s)}"
            f"&ssl_certfile={_at(s.certificates.client_file)}"
        ),
        1,
        is_locked=True,
    ),
    "mutual TLS, an encrypted key": Variant(
        lambda s: (
            f"rediss://{s.login}@localhost:{s.tls_mutual.port}/1?{_ca(s)}"
            f"&{_client(s, 'client-encrypted.key')}&ssl_password={s.key_password}"
        ),
        1,
        is_locked=True,
    ),
}
