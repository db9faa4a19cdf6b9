"""Hostile input: one request, reply, message or record can stop nobody but itself.

Each `test_<kind>.py` has a table of cases for one kind of attack. A case names the door through which its
input comes (`doors.py`), the input, and the code with which it is answered. After each case the worker
executes the next run. `pytest tests/hostile` prints a table of what was tried (`table.py`).
"""
