"""Networks: the only place that says whether an address is on the public internet."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv6Address

__all__ = ["is_public"]

EMBEDDING: tuple[tuple[ipaddress.IPv6Network, int], ...] = tuple(
    (ipaddress.IPv6Network(network), first_bit)
    for network, first_bit in (
        ("::ffff:0:0/96", 96),  # IPv4-mapped (RFC 4291)
        ("::ffff:0:0:0/96", 96),  # IPv4-translated (RFC 2765)
        ("::/96", 96),  # IPv4-compatible (RFC 4291, deprecated)
        ("64:ff9b::/96", 96),  # NAT64, the well-known prefix (RFC 6052)
        ("2002::/16", 16),  # 6to4 (RFC 3056)
    )
)
"""IPv6 networks through which an IPv4 address is reached, and the bit at which that begins."""

REFUSED = tuple(
    map(
        ipaddress.ip_network,
        (
            "64:ff9b:1::/48",  # NAT64 in a network of one's own (RFC 8215); where the address stands differs
            "fec0::/10",  # site-local (RFC 3879, deprecated; still routed by who uses it)
            "2001::/32",  # Teredo (RFC 4380): the address is that of a client behind a NAT
            "5f00::/16",  # SRv6 segments (RFC 9602)
            "3fff::/20",  # documentation (RFC 9637)
            "192.88.99.0/24",  # relays of 6to4 (RFC 7526, deprecated)
            "192.0.0.0/24",  # of protocols (RFC 6890)
        ),
    )
)
"""What some versions of Python count as global, and is not the public internet."""


def is_public(address: str) -> bool:
    """Whether an address, as the resolver gives it, is on the public internet.

    An IPv6 address through which an IPv4 address is reached is judged by that one. Anything that is not an
    address is not public.

    >>> is_public("64:ff9b::7f00:1"), is_public("64:ff9b::808:808"), is_public("8.8.8.8")
    (False, True, True)
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        reached = _reached_through(ip)
        if reached is not None:
            return is_public(str(reached))
        if _is_isatap(ip) and not is_public(str(IPv4Address(int(ip) & 0xFFFF_FFFF))):
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in REFUSED)


def _reached_through(ip: IPv6Address) -> IPv4Address | None:
    return next(
        (IPv4Address(int(ip) >> (96 - bit) & 0xFFFF_FFFF) for network, bit in EMBEDDING if ip in network),
        None,
    )


def _is_isatap(ip: IPv6Address) -> bool:
    """Whether its end says that an IPv4 address follows (RFC 5214), with or without the `u` bit."""
    return int(ip) >> 32 & 0xFDFF_FFFF == 0x0000_5EFE
