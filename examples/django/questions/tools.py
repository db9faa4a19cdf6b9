"""What the agent may do: a synchronous tool, in a thread whose database connections are closed after it."""

from openagents_worker import tool
from questions.models import Question


@tool
def count_questions(customer: str) -> int:
    """Says how many questions a customer has asked so far."""
    return Question.objects.filter(customer=customer).count()
