"""Telemetry: the log of a process, and reports to Sentry."""
