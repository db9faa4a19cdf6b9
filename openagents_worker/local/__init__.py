"""Processes on this machine: an embedded Redis, and the development stack."""
