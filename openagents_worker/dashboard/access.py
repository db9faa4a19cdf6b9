"""Access. The only place that decides where Flower may listen, and which requests it answers."""

from __future__ import annotations

import os
import sys
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, NoReturn
from urllib.parse import urlsplit

from openagents_worker.dashboard.flower_options import is_this_machine

__all__ = [
    "HOSTS_VARIABLE",
    "AllowedHosts",
    "can_be_compared",
    "check_listening",
    "checked_passwords",
    "has_password",
    "is_from_own_page",
]

HOSTS_VARIABLE = "FLOWER_HOSTS"
LOOPBACK = "127.0.0.1"
UNSAFE = 2
"""The exit code of a Flower that would be open to others."""


def refuse_to_start(message: str) -> NoReturn:
    """Print why Flower does not start, and exit with code 2."""
    print(message, file=sys.stderr)
    sys.exit(UNSAFE)


def check_listening(options: Any) -> None:
    """Set the default address, and exit if Flower would listen on another one without a password.

    Flower's own default is all interfaces of the machine. An empty password, as of an unset variable, is
    none.
    """
    options.basic_auth = checked_passwords(options.basic_auth)
    if not options.address and not options.unix_socket:
        options.address = LOOPBACK
    if not (options.unix_socket or has_password(options) or is_this_machine(options.address)):
        refuse_to_start(
            f"Flower would listen on {options.address} without a password.\n"
            "  hint: set FLOWER_BASIC_AUTH=user:password, or omit --address to listen on this machine only"
        )


def checked_passwords(pairs: Sequence[str] | None) -> list[str]:
    """The pairs `user:password` without empty ones. Exits if one is not such a pair."""
    given = [pair for pair in pairs or () if pair]
    if not all(0 < pair.find(":") < len(pair) - 1 for pair in given):
        refuse_to_start("FLOWER_BASIC_AUTH must have the form user:password")
    if not all(map(str.isascii, given)):
        refuse_to_start(
            "FLOWER_BASIC_AUTH has a character that is not ASCII: Flower could not compare a password with it"
        )
    return given


def can_be_compared(authorization: str) -> bool:
    """Whether Flower can compare the password in this header with its own.

    For one with other characters than ASCII it would answer with a traceback, before the login.
    """
    try:
        return b64decode(authorization.partition(" ")[2].encode()).decode().isascii()
    except ValueError:
        return True  # Flower refuses what it cannot decode


def has_password(options: Any) -> bool:
    """Whether users of Flower must authenticate."""
    return bool(options.basic_auth or options.auth)


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """The values of the header `Host` that are answered.

    Any web page can make its own name resolve to this machine (DNS rebinding). Its requests have that name in
    `Host`. A browser does not send the password of Flower with them, so with a password every name is allowed
    unless `names` are given.
    """

    names: frozenset[str]
    address: str = ""
    allows_others: bool = False

    @classmethod
    def of(cls, options: Any, env: Mapping[str, str] = os.environ) -> AllowedHosts:
        """The hosts for these options of Flower, and for the names in `FLOWER_HOSTS`."""
        names = frozenset(name.strip().lower() for name in env.get(HOSTS_VARIABLE, "").split(",")) - {""}
        is_open = has_password(options) or bool(options.unix_socket)
        return cls(names, options.address or "", allows_others=is_open and not names)

    def allow(self, host: str) -> bool:
        """Whether a request with this header is answered. An address is never the name of another site."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".").lower()
        except ValueError:
            return False
        if is_this_machine(name) or name in self.names or name == self.address.lower():
            return True
        return bool(name) and (self.allows_others or (bool(self.names) and _is_address(name)))


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def is_from_own_page(headers: Mapping[str, str], host: str) -> bool:
    """Whether a browser sent the request from a page of this server. A request without proof is not.

    Browsers send `Origin` with every POST, and recent ones `Sec-Fetch-Site`, too.
    """
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if site is None and origin is None:
        return False
    return site in (None, "same-origin") and (origin is None or urlsplit(origin).netloc == host)
