"""The database model of a question."""

from django.db import models


class Question(models.Model):
    """A question of a customer. The answer is empty until the run has completed."""

    customer = models.CharField(max_length=100)
    text = models.TextField()
    run_id = models.CharField(max_length=256, blank=True)
    answer = models.TextField(blank=True)
