"""The runtime: executes one run in an attempt and records its calls."""
