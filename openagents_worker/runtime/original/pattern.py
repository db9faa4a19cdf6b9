"""Patterns written for the original SDK: the only place that adapts them to this runtime.

Such a pattern has a method of the original that the patterns of this library do not have. It may derive from
the base class of the package, or from nothing. Its model and tool calls are recorded like those of any other
pattern, so it continues after a crash without knowing it.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from openagents_worker.errors import MaxStepsExceeded, ToolNotFoundError, text_of
from openagents_worker.runtime.context import AttemptContext
from openagents_worker.runtime.original.context import set_up
from openagents_worker.runtime.original.finalizing import Finalize, finalized
from openagents_worker.runtime.original.model import OriginalModel
from openagents_worker.runtime.original.package import is_instance, loaded
from openagents_worker.runtime.original.tools import OriginalTool
from openagents_worker.runtime.user_code import class_path

__all__ = ["OriginalPattern"]

NO_ANSWER = "Plan executed"
"""What the package's `plan_execute` returns, in place of the model's answer, if no tool was called."""

_MAX_STEPS = re.compile(r"Pattern exceeded max_steps \(\d+\)")
_UNKNOWN_TOOL = re.compile(r"Tool '(.*)' is not registered")


class OriginalPattern:
    """A pattern of the original SDK as one of this library. Its other attributes are those of the pattern."""

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern
        self.code_path = class_path(pattern)
        """The name of the pattern's class in logs, in place of this class."""
        self._model: OriginalModel | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pattern, name)

    async def set_context(self, context: AttemptContext) -> None:
        """Give the run's context to the pattern, with model and tools as the pattern expects them."""
        self._model = OriginalModel(context)
        context.llm_client = self._model
        context.tools = {id_: OriginalTool(tool) for id_, tool in context.tools.items()}
        if is_instance(self._pattern, "interfaces.pattern", "PatternPlugin"):
            _leave_cost_to_runtime(context)
        await set_up(self._pattern, context)

    @property
    def finish_reason(self) -> Any:
        """Why the model ended its answer; of its last reply, unless the pattern says another."""
        own = getattr(self._pattern, "finish_reason", None)
        reply = self._model.get_last_response() if self._model is not None else None
        return own if own is not None or reply is None else reply.finish_reason

    async def execute(self) -> Any:
        """The pattern's output. Errors that the package raises without a code get one."""
        try:
            output = await self._pattern.execute()
        except RuntimeError as error:
            if _MAX_STEPS.fullmatch(text_of(error)):
                raise MaxStepsExceeded(text_of(error)) from error
            raise
        except KeyError as error:
            if error.args and (found := _UNKNOWN_TOOL.match(text_of(error.args[0]))):
                raise ToolNotFoundError(text_of(error.args[0]), found[1]) from error
            raise
        return self._with_answer(output)

    def _with_answer(self, output: Any) -> Any:
        """The output, or the answer that the package's `plan_execute` drops if no tool was called."""
        is_dropped = output == NO_ANSWER and is_instance(
            self._pattern, "plugins.builtin.pattern.plan_execute", "PlanExecutePattern"
        )
        reply = self._model.get_last_response() if is_dropped and self._model is not None else None
        return output if reply is None or reply.tool_calls else reply.output_text or output

    @property
    def finalized(self) -> Finalize | None:
        """What calls the pattern's `finalize`. None if it has none, or only that of the package's base class,
        which does what the runtime does anyway."""
        finalize = getattr(type(self._pattern), "finalize", None)
        base = loaded("interfaces.pattern", "PatternPlugin")
        is_inherited = finalize is None or finalize is getattr(base, "finalize", None)
        return None if is_inherited else partial(finalized, self._pattern.finalize)


def _leave_cost_to_runtime(context: AttemptContext) -> None:
    """Remove `max_cost_usd` from the request that the pattern sees.

    The runtime enforces it for every model call. The package's `call_llm` would enforce it once more, and end
    a run that may wait for an extension of its budget.
    """
    budget = context.run_request.budget
    if budget is not None and budget.max_cost_usd is not None:
        own = budget.model_copy(update={"max_cost_usd": None})
        context.run_request = context.run_request.model_copy(update={"budget": own})
