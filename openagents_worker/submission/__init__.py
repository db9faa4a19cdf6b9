"""Submission: a request becomes an accepted run. Producers, child runs and schedules all submit here."""
