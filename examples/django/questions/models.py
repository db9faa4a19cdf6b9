"""What the product keeps of a question."""

from django.db import models


class Question(models.Model):
    """A customer's question; the answer is empty until the run is over."""

    customer = models.CharField(max_length=100)
    text = models.TextField()
    run_id = models.CharField(max_length=256, blank=True)
    answer = models.TextField(blank=True)
