"""Testing: a model server, fixtures and helpers for suites that use this library."""
