"""Tools: what an agent can do. The contract is in `base`, what we ship in `builtin`."""
