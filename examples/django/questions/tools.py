"""The tools of the agent. Synchronous tools run in a thread; its database connections are closed afterwards."""

from openagents_worker import tool
from questions.models import Question


@tool
def count_questions(customer: str) -> int:
    """Returns the number of questions that a customer has asked so far."""
    return Question.objects.filter(customer=customer).count()
