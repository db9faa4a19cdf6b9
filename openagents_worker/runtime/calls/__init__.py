"""Recorded models and tools: wrappers that record each call of a pattern."""
