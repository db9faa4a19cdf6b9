"""Guards: the rules that every call of a tool passes before the tool is called, in this order.

Each guard is one function in a file of its own, see `Guard`. Single calls, concurrent calls of one turn and
calls inside other calls pass the same list.
"""

from openagents_worker.runtime.calls.guards.announcement import announcement
from openagents_worker.runtime.calls.guards.approval import approval
from openagents_worker.runtime.calls.guards.arguments import arguments
from openagents_worker.runtime.calls.guards.budget import budget
from openagents_worker.runtime.calls.guards.concurrency import concurrency
from openagents_worker.runtime.calls.guards.deadline import deadline
from openagents_worker.runtime.calls.guards.fallback import fallback
from openagents_worker.runtime.calls.guards.hooks import hooks
from openagents_worker.runtime.calls.guards.intent import intent
from openagents_worker.runtime.calls.guards.interruption import interruption
from openagents_worker.runtime.calls.guards.lease_margin import lease_margin
from openagents_worker.runtime.calls.guards.order import order
from openagents_worker.runtime.calls.guards.retry import retry
from openagents_worker.runtime.calls.tool_call import Guard

__all__ = ["GUARDS"]

GUARDS: tuple[Guard, ...] = (
    budget,  # first: a call over the budget is not made, so no event says that it was
    announcement,
    arguments,  # before the approval: nobody is asked about a call that is invalid
    approval,
    order,  # after the approval: calls of one turn are asked about together
    concurrency,  # after the approval: a call that waits for a person keeps no other call from being made
    intent,  # after the approval: the intent holds the arguments with which the tool is called
    lease_margin,  # after the checks, which may take longer than the lease
    interruption,  # around everything that is executed: `after_invoke` belongs to it
    fallback,  # around the hooks: `after_invoke` learns that the tool has failed
    hooks,  # around the deadline: `after_invoke` learns that the tool took too long
    retry,  # inside the hooks, which see one call; each try has a deadline of its own
    deadline,
)
