"""The producer: all that a program needs to submit runs and to follow them."""
