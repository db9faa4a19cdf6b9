"""Chaos runs: a deployment under load, a seeded schedule of faults, and an audit of everything that is left.

`python -m chaos --seed 7 --minutes 10` repeats the schedule of seed 7. `docs/faults.md` explains the report.
"""
