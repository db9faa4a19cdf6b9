"""Networks: the only place that says whether an address is on the public internet."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv6Address

__all__ = ["is_public"]

IPV4_IN_IPV6: tuple[tuple[ipaddress.IPv6Network, int], ...] = tuple(
    (ipaddress.IPv6Network(network), first_bit)
    for network, first_bit in (
        ("::ffff:0:0/96", 96),  # IPv4-mapped (RFC 4291)
        ("::ffff:0:0:0/96", 96),  # IPv4-translated (RFC 2765)
        ("::/96", 96),  # IPv4-compatible (RFC 4291, deprecated)
        ("64:ff9b::/96", 96),  # NAT64, the well-known prefix (RFC 6052)
        ("2002::/16", 16),  # 6to4 (RFC 3056)
    )
)
"""IPv6 networks whose addresses contain an IPv4 address, and the first bit of that IPv4 address."""

NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "64:ff9b:1::/48",  # local-use NAT64 (RFC 8215); the position of the IPv4 address differs
            "fec0::/10",  # site-local (RFC 3879, deprecated; some networks still route it)
            "2001::/32",  # Teredo (RFC 4380): the address of a client behind a NAT
            "5f00::/16",  # SRv6 segments (RFC 9602)
            "3fff::/20",  # documentation (RFC 9637)
            "192.88.99.0/24",  # 6to4 relays (RFC 7526, deprecated)
            "192.0.0.0/24",  # IETF protocol assignments (RFC 6890)
        ),
    )
)
"""Networks that some versions of Python count as global although they are not on the public internet."""


def is_public(address: str) -> bool:
    """Whether an address, as the resolver returns it, is on the public internet.

    For an IPv6 address that contains an IPv4 address, the IPv4 address decides. Text that is not an address
    is not public.

    >>> is_public("64:ff9b::7f00:1"), is_public("64:ff9b::808:808"), is_public("8.8.8.8")
    (False, True, True)
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        embedded = _embedded_ipv4(ip)
        if embedded is not None:
            return is_public(str(embedded))
        if _is_isatap(ip) and not is_public(str(IPv4Address(int(ip) & 0xFFFF_FFFF))):
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in NOT_PUBLIC)


def _embedded_ipv4(ip: IPv6Address) -> IPv4Address | None:
    return next(
        (IPv4Address(int(ip) >> (96 - bit) & 0xFFFF_FFFF) for network, bit in IPV4_IN_IPV6 if ip in network),
        None,
    )


def _is_isatap(ip: IPv6Address) -> bool:
    """Whether it is an ISATAP address, which ends with an IPv4 address (RFC 5214); the `u` bit is ignored."""
    return int(ip) >> 32 & 0xFDFF_FFFF == 0x0000_5EFE
