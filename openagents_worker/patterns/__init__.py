"""Patterns: the loops between a model and tools."""
