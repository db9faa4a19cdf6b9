"""The configuration of Flower. Start it with `celery -A tasks flower --conf=config/flowerconfig.py`.

Flower reads each option from the module-level name of the same name. It has parsed its command line and the
`FLOWER_` variables before it executes this file, so the file can reject unsafe combinations.
"""

import os

from tornado.options import options as _options

from openagents_worker.dashboard.access import check_listening as _check_listening
from openagents_worker.dashboard.fleet_metrics import serve_fleet_metrics as _serve_fleet_metrics
from openagents_worker.dashboard.flower_options import (
    control_from_this_machine,
    format_task,  # noqa: F401 - read by Flower
    is_false,
    is_this_machine,
    is_true,
    tasks_columns,  # noqa: F401 - read by Flower
)
from openagents_worker.dashboard.log_text import escape_log_lines as _escape_log_lines
from openagents_worker.dashboard.sockets import read_sockets_as_celery_does as _read_sockets_as_celery_does

_read_sockets_as_celery_does()
_escape_log_lines()
_serve_fleet_metrics()  # at /metrics, beside Flower's own

# The default of Flower is all interfaces of the machine, without a password. Here it is this machine. Flower
# exits with code 2 if it would listen elsewhere without FLOWER_BASIC_AUTH=user:password[,user:password].
_check_listening(_options)
address, basic_auth = _options.address, _options.basic_auth

# By default, users of Flower can only read. FLOWER_READ_ONLY=0 allows them to revoke runs and to shut down
# workers; only a value that says no does. The buttons need Flower's API, which requires a password or
# FLOWER_UNAUTHENTICATED_API. If the API is not available, the buttons are hidden.
_is_local = is_this_machine(address) and not _options.unix_socket
_has_password = bool(basic_auth or _options.auth)
_api_is_open = is_true(os.environ.get("FLOWER_UNAUTHENTICATED_API", ""))
read_only = not is_false(os.environ.get("FLOWER_READ_ONLY", ""))
if not read_only and not _has_password and _is_local:
    control_from_this_machine()
elif not _has_password and not _api_is_open:
    read_only = True
