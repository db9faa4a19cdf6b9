"""Models: one contract, several providers. Siblings of tools, memory and context; they do not know each other."""
