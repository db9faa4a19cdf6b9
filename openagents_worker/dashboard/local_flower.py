"""The configuration of Flower in `openagents-worker dev`. Its buttons work without a password."""

from openagents_worker.dashboard.fleet_metrics import serve_fleet_metrics as _serve_fleet_metrics
from openagents_worker.dashboard.flower_options import control_from_this_machine, format_task, tasks_columns
from openagents_worker.dashboard.log_text import escape_log_lines as _escape_log_lines

__all__ = ["format_task", "read_only", "tasks_columns"]

read_only = False
control_from_this_machine()
_escape_log_lines()
_serve_fleet_metrics()
