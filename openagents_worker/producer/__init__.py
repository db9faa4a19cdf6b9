"""The producer: submit runs, wait for their results, and watch their events."""
