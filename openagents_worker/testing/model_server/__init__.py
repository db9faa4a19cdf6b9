"""A model behind HTTP, for tests: the wire formats of OpenAI and Anthropic, from a script or a function.

`python -m openagents_worker.testing.model_server --script FILE.json` runs it in a process of its own; the
first line it prints is its address.
"""

from openagents_worker.testing.model_server.answers import FAULTS
from openagents_worker.testing.model_server.server import ModelServer, ReplyFunction
from openagents_worker.testing.model_server.wire_format import ModelRequest

__all__ = ["FAULTS", "ModelRequest", "ModelServer", "ReplyFunction"]
