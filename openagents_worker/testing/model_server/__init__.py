"""A model server for tests: it implements the APIs of OpenAI and Anthropic. Replies come from a script or a
function.

`python -m openagents_worker.testing.model_server --script FILE.json` runs it as a process. The first line of
its output is its URL.
"""

from openagents_worker.moved import forward
from openagents_worker.testing.model_server.answers import FAULTS
from openagents_worker.testing.model_server.server import ModelServer, ReplyFunction
from openagents_worker.testing.model_server.wire_format import ModelServerRequest

__getattr__ = forward(
    __name__, "openagents_worker.testing.model_server.wire_format", {"ModelRequest": "ModelServerRequest"}
)

__all__ = ["FAULTS", "ModelServerRequest", "ModelServer", "ReplyFunction"]
