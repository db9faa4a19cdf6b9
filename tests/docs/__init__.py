"""The documentation, tried out: every fenced block is executed, parsed or checked."""
