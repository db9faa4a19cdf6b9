"""`shop` is a product with a suite of its own; `test_suite.py` runs it as its owner would."""

collect_ignore = ["shop"]
