"""Flower's settings. Started as `celery -A tasks flower --conf=config/flowerconfig.py`.

Flower sets each option from the module-level name that is spelt like it. Its command line and its `FLOWER_`
variables have been read when this file is, so that it can refuse what would be unsafe.
"""

import ipaddress
import os
import sys

from tornado.options import options as _given

from openagents_worker.dashboard.sockets import read_sockets_as_celery_does as _read_sockets_as_celery_does

_TRUE = ("1", "true", "yes", "on")


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_read_sockets_as_celery_does()

# Flower's own default is every interface of the machine, with nobody asked for a password.
address = _given.address or "127.0.0.1"

# FLOWER_BASIC_AUTH=user:password[,user:password]
basic_auth = [pair for pair in _given.basic_auth or [] if pair]

# Who may look may not yet shut workers down; FLOWER_READ_ONLY=0 allows it.
read_only = os.environ.get("FLOWER_READ_ONLY", "1").strip().lower() in _TRUE

if not all(0 < pair.find(":") < len(pair) - 1 for pair in basic_auth):
    sys.exit("FLOWER_BASIC_AUTH must have the form user:password")

if not (_is_this_machine(address) or _given.unix_socket or basic_auth or _given.auth):
    sys.exit(
        f"Flower would listen on {address} and ask nobody for a password.\n"
        "  hint: set FLOWER_BASIC_AUTH=user:password, or leave out --address to listen on this machine only"
    )
