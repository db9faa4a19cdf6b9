"""Flower's settings. Started as `celery -A tasks flower --conf=config/flowerconfig.py`.

Flower sets each option from the module-level name that is spelt like it. Its command line and its `FLOWER_`
variables have been read when this file is, so that it can refuse what would be unsafe.
"""

import os
import sys

from tornado.options import options as _given

# Agent, session and run of each row, and why it waits or how it failed.
from openagents_worker.dashboard.flower_options import (
    control_from_this_machine,
    format_task,  # noqa: F401 - read by Flower
    is_this_machine,
    tasks_columns,  # noqa: F401 - read by Flower
)
from openagents_worker.dashboard.log_text import escape_log_lines as _escape_log_lines
from openagents_worker.dashboard.sockets import read_sockets_as_celery_does as _read_sockets_as_celery_does

_TRUE = ("1", "true", "yes", "on")

_read_sockets_as_celery_does()
_escape_log_lines()

# Flower's own default is every interface of the machine, with nobody asked for a password.
address = _given.address or "127.0.0.1"

# FLOWER_BASIC_AUTH=user:password[,user:password]
basic_auth = [pair for pair in _given.basic_auth or [] if pair]

if not all(0 < pair.find(":") < len(pair) - 1 for pair in basic_auth):
    sys.exit("FLOWER_BASIC_AUTH must have the form user:password")

if not (is_this_machine(address) or _given.unix_socket or basic_auth or _given.auth):
    sys.exit(
        f"Flower would listen on {address} and ask nobody for a password.\n"
        "  hint: set FLOWER_BASIC_AUTH=user:password, or leave out --address to listen on this machine only"
    )

# Who may look may not yet cancel runs and shut workers down; FLOWER_READ_ONLY=0 allows it. Flower's buttons
# call its API, which answers nobody without a password: where they could not work, they are not shown.
_is_local = is_this_machine(address) and not _given.unix_socket
_has_password = bool(basic_auth or _given.auth)
_api_is_open = os.environ.get("FLOWER_UNAUTHENTICATED_API", "").strip().lower() in _TRUE
read_only = os.environ.get("FLOWER_READ_ONLY", "1").strip().lower() in _TRUE
if not read_only and not _has_password and _is_local:
    control_from_this_machine()
elif not _has_password and not _api_is_open:
    read_only = True
