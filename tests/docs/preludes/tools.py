"""What a module of tools imports."""

from typing import Any

from openagents_worker import tool
from openagents_worker.tools.base import ToolContext
