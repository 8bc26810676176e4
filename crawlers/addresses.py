"""Which addresses crawlers may talk to, and how a URL is shown."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from urllib3.connectionpool import HTTPConnectionPool

from audit.errors import CrawlError
from audit.storable import storable


def is_loopback(host: str | None) -> bool:
    """Whether ``host`` names this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address((host or "").strip("[]")).is_loopback
    except ValueError:
        return False


def shown(url: str) -> str:
    """``url`` without user, query and fragment, which can hold secrets, for messages."""
    try:
        parts = urlsplit(url)
    except ValueError:  # of a host in brackets that is none
        return "what is no URL"
    return storable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")[:200]


# IPv6 networks whose addresses carry an IPv4 address, and the bit at which it ends: whoever routes them reaches it.
_CARRIED_AT = {
    ipaddress.IPv6Network("::/96"): 0,  # IPv4-compatible
    ipaddress.IPv6Network("::ffff:0:0/96"): 0,  # IPv4-mapped
    ipaddress.IPv6Network("::ffff:0:0:0/96"): 0,  # IPv4-translated
    ipaddress.IPv6Network("64:ff9b::/96"): 0,  # NAT64
    ipaddress.IPv6Network("2002::/16"): 80,  # 6to4
}
# Refused whole: NAT64 of an operator's own (its addresses carry IPv4 in any of six places), and Teredo tunnels.
_OPAQUE = tuple(map(ipaddress.IPv6Network, ("64:ff9b:1::/48", "2001::/32")))


def check_address(address: str) -> None:
    """Raise CrawlError unless the IP ``address`` is a public one, and so is an IPv4 address that it carries."""
    if not _is_public(ipaddress.ip_address(address.partition("%")[0])):
        raise CrawlError(f"refused to talk to {address}: not a public address (allow it with --allow-private)")


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(ip, ipaddress.IPv6Address):
        if any(ip in network for network in _OPAQUE):
            return False
        for network, shift in _CARRIED_AT.items():
            if ip in network:
                return _is_public(ipaddress.IPv4Address((int(ip) >> shift) & 0xFFFFFFFF))
    return ip.is_global and not ip.is_multicast


def check_url(url: str) -> None:
    """Raise CrawlError unless ``url`` is https, or http to this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname)):
        raise CrawlError(f"refused {shown(url)}: only https is used, except to this machine")


def public_only(pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
    """``pool`` whose connections end before a byte is sent where the peer is not a public address.

    The check is on the connected socket, so a name that resolves differently the second time does not get around it.
    """

    class PublicConnection(pool.ConnectionCls):  # type: ignore[name-defined]
        def _new_conn(self) -> socket.socket:
            connected = super()._new_conn()
            try:
                check_address(connected.getpeername()[0])
            except CrawlError:
                connected.close()
                raise
            return connected

    class PublicPool(pool):  # type: ignore[misc, valid-type]
        ConnectionCls = PublicConnection

    return PublicPool
