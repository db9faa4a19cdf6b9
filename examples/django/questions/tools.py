"""The tools of the agent. They run in threads, and their database connections are closed after each call."""

from openagents_worker import tool
from questions.models import Question


@tool
def count_questions(customer: str) -> int:
    """Returns the number of questions that a customer has asked so far."""
    return Question.objects.filter(customer=customer).count()
