"""TLS to Redis. The only place that defines how the server is verified and which certificate is sent."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = ["CertReqs", "Tls"]


class CertReqs(StrEnum):
    """Whether the server must present a certificate that can be verified; the names are redis-py's."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Tls:
    """The TLS options of a `rediss://` URL. File names are those of this machine.

    Without `ca_certs` the certificate authorities of the system are used; without `certfile` no client
    certificate is sent.
    """

    cert_reqs: CertReqs = CertReqs.REQUIRED
    check_hostname: bool = True
    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    key_password: str | None = field(default=None, repr=False)
    ciphers: str | None = None

    @classmethod
    def of_celery(cls, options: Mapping[str, Any]) -> Tls | None:
        """The options of an app's `broker_use_ssl`. None if they cannot be written in a URL."""
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
        """The arguments for redis-py, also by way of Celery and Flower. Defaults are explicit."""
        files = {
            "ssl_ca_certs": self.ca_certs,
            "ssl_certfile": self.certfile,
            "ssl_keyfile": self.keyfile,
            "ssl_password": self.key_password,
            "ssl_ciphers": self.ciphers,
        }
        files_given = {name: value for name, value in files.items() if value is not None}
        return {
            "ssl_cert_reqs": self.cert_reqs.value,
            "ssl_check_hostname": self.check_hostname,
            **files_given,
        }

    def url_options(self) -> dict[str, Any]:
        """The same values as options of a URL."""
        return {**self.redis_options(), "ssl_check_hostname": str(self.check_hostname).lower()}

    def check_files(self) -> None:
        """Raises `ValueError` with the option whose file cannot be used and the reason."""
        self._load_files_and_ciphers(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def context(self) -> ssl.SSLContext:
        """The SSL context of all connections; it is made again when a file was replaced.

        redis-py would make one for each connection. Raises `ValueError` as `check_files` does.
        """
        stamps = tuple(map(_file_stamp, (self.ca_certs, self.certfile, self.keyfile)))
        made = _contexts.get(self)
        if made is None or made[0] != stamps:
            context = (
                ssl.create_default_context()
            )  # reads the authorities of the system, which takes tens of milliseconds
            context.check_hostname = self.check_hostname
            context.verify_mode = ssl.VerifyMode[f"CERT_{self.cert_reqs.name}"]
            self._load_files_and_ciphers(context)
            made = _contexts[self] = stamps, context
        return made[1]

    def _load_files_and_ciphers(self, context: ssl.SSLContext) -> None:
        self._load_authorities(context)
        self._load_own_certificate(context)
        if self.ciphers is not None:
            try:
                context.set_ciphers(self.ciphers)
            except ssl.SSLError:
                raise ValueError("the option ssl_ciphers contains no cipher that OpenSSL supports") from None

    def _load_authorities(self, context: ssl.SSLContext) -> None:
        if self.ca_certs is None:
            return
        _check_readable("ssl_ca_certs", self.ca_certs)
        try:
            context.load_verify_locations(self.ca_certs)
        except ssl.SSLError:
            raise ValueError(
                f"the option ssl_ca_certs is not a file of PEM certificates: {self.ca_certs}"
            ) from None

    def _load_own_certificate(self, context: ssl.SSLContext) -> None:
        if self.certfile is None or self.keyfile is None:
            return
        _check_readable("ssl_certfile", self.certfile)
        _check_readable("ssl_keyfile", self.keyfile)
        try:
            # Without a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(self.certfile, self.keyfile, password=lambda: self.key_password or "")
        except (ssl.SSLError, ValueError):
            raise ValueError(
                "the options ssl_certfile and ssl_keyfile are not a PEM certificate and its key: "
                f"{self.certfile}, {self.keyfile}; check that they belong together, and whether the key "
                "needs ssl_password"
            ) from None


_FileStamp = tuple[int, int] | None

_contexts: dict[Tls, tuple[tuple[_FileStamp, ...], ssl.SSLContext]] = {}


def _file_stamp(path: str | None) -> _FileStamp:
    """The modification time and size of a file, to notice that it was replaced; None without a file."""
    try:
        found = Path(path).stat() if path is not None else None
    except OSError:
        return None
    return found and (found.st_mtime_ns, found.st_size)


def _check_readable(option: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ValueError(
            f"the file of the option {option} cannot be read: {path}: {error.strerror}"
        ) from None


def _cert_reqs_of_celery(value: Any) -> CertReqs | None:
    """Celery accepts a constant of the module `ssl`, its name, redis-py's name, or None."""
    if value is None:
        return CertReqs.NONE
    name = value.name if isinstance(value, ssl.VerifyMode) else str(value)
    try:
        return CertReqs(name.lower().removeprefix("cert_"))
    except ValueError:
        return None
