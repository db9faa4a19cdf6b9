"""Hostile input: a malicious request, reply, message or record affects only its own run.

Each `test_<kind>.py` has a table of cases for one kind of attack. A case names the entry point of its input
(`entry_points.py`), the input, and the expected error code. After each case the worker executes another run.
`pytest tests/hostile` prints a table of all inputs (`table.py`).
"""
