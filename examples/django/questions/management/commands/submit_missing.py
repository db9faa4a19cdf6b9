"""`manage.py submit_missing`: submits runs that were never accepted. It is safe to repeat."""

from typing import Any

from django.core.management.base import BaseCommand

from questions.models import Question
from questions.runs import state_of, submit_again


class Command(BaseCommand):
    help = "Submit the runs of unanswered questions that Redis does not know."

    def handle(self, *args: Any, **options: Any) -> None:
        unanswered = Question.objects.filter(answer="")
        missing = [question for question in unanswered if state_of(question) == "MISSING"]
        for question in missing:
            submit_again(question)
        self.stdout.write(f"submitted {len(missing)} of {len(unanswered)} unanswered questions")
