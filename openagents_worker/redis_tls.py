"""TLS to a Redis. The only place that says what is checked of the server, and what we show of ourselves."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = ["CertReqs", "Tls"]


class CertReqs(StrEnum):
    """Whether the server must show a certificate that we can check."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Tls:
    """What `rediss://` says. File names are those of this machine; None: the system's own, or none at all."""

    cert_reqs: CertReqs = CertReqs.REQUIRED
    check_hostname: bool = True
    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    key_password: str | None = field(default=None, repr=False)
    ciphers: str | None = None

    @classmethod
    def of_celery(cls, options: Mapping[str, Any]) -> Tls | None:
        """From an app's `broker_use_ssl`; None when it says what a URL cannot say."""
        known = {
            "ssl_ca_certs": "ca_certs",
            "ssl_certfile": "certfile",
            "ssl_keyfile": "keyfile",
            "ssl_password": "key_password",
            "ssl_ciphers": "ciphers",
        }
        cert_reqs = _cert_reqs_of_celery(options.get("ssl_cert_reqs", CertReqs.REQUIRED))
        others = options.keys() - known.keys() - {"ssl_cert_reqs", "ssl_check_hostname"}
        named = {
            known[name]: str(value) for name, value in options.items() if name in known and value is not None
        }
        if cert_reqs is None or others:
            return None
        is_checked = cert_reqs is not CertReqs.NONE
        return cls(cert_reqs, bool(options.get("ssl_check_hostname", is_checked)) and is_checked, **named)

    def redis_options(self) -> dict[str, Any]:
        """As redis-py takes it, and Celery and Flower, which pass it on: every choice is said."""
        files = {
            "ssl_ca_certs": self.ca_certs,
            "ssl_certfile": self.certfile,
            "ssl_keyfile": self.keyfile,
            "ssl_password": self.key_password,
            "ssl_ciphers": self.ciphers,
        }
        given = {name: value for name, value in files.items() if value is not None}
        return {"ssl_cert_reqs": self.cert_reqs.value, "ssl_check_hostname": self.check_hostname, **given}

    def url_options(self) -> dict[str, Any]:
        """The same as options of a URL."""
        return {**self.redis_options(), "ssl_check_hostname": str(self.check_hostname).lower()}

    def check_files(self) -> None:
        """Raises `ValueError` that names the option whose file cannot be used, and says why."""
        self._fill(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def context(self) -> ssl.SSLContext:
        """What redis-py would make for each connection, made once for all of them, and again when a file was
        replaced. Raises `ValueError` as `check_files`."""
        stamp = tuple(map(_stamp, (self.ca_certs, self.certfile, self.keyfile)))
        made = _contexts.get(self)
        if made is None or made[0] != stamp:
            context = ssl.create_default_context()  # reads the system's authorities: tens of milliseconds
            context.check_hostname = self.check_hostname
            context.verify_mode = ssl.VerifyMode[f"CERT_{self.cert_reqs.name}"]
            self._fill(context)
            made = _contexts[self] = stamp, context
        return made[1]

    def _fill(self, context: ssl.SSLContext) -> None:
        self._load_authorities(context)
        self._load_own_certificate(context)
        if self.ciphers is not None:
            try:
                context.set_ciphers(self.ciphers)
            except ssl.SSLError:
                raise ValueError("its option ssl_ciphers names no cipher that OpenSSL has") from None

    def _load_authorities(self, context: ssl.SSLContext) -> None:
        if self.ca_certs is None:
            return
        _read("ssl_ca_certs", self.ca_certs)
        try:
            context.load_verify_locations(self.ca_certs)
        except ssl.SSLError:
            raise ValueError(
                f"its option ssl_ca_certs names no file of PEM certificates: {self.ca_certs}"
            ) from None

    def _load_own_certificate(self, context: ssl.SSLContext) -> None:
        if self.certfile is None or self.keyfile is None:
            return
        _read("ssl_certfile", self.certfile)
        _read("ssl_keyfile", self.keyfile)
        try:
            # Without a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(self.certfile, self.keyfile, password=lambda: self.key_password or "")
        except (ssl.SSLError, ValueError):
            raise ValueError(
                "its options ssl_certfile and ssl_keyfile name no PEM certificate with its key: "
                f"{self.certfile}, {self.keyfile}; is that its key, and does it need ssl_password?"
            ) from None


_Stamp = tuple[int, int] | None

_contexts: dict[Tls, tuple[tuple[_Stamp, ...], ssl.SSLContext]] = {}


def _stamp(path: str | None) -> _Stamp:
    """Changes when the file does; None without one."""
    try:
        found = Path(path).stat() if path is not None else None
    except OSError:
        return None
    return found and (found.st_mtime_ns, found.st_size)


def _read(option: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ValueError(
            f"its option {option} names a file that cannot be read: {path}: {error.strerror}"
        ) from None


def _cert_reqs_of_celery(value: Any) -> CertReqs | None:
    """Celery takes a constant of the module ssl, its name, redis-py's word for it, or None."""
    if value is None:
        return CertReqs.NONE
    name = value.name if isinstance(value, ssl.VerifyMode) else str(value)
    try:
        return CertReqs(name.lower().removeprefix("cert_"))
    except ValueError:
        return None
