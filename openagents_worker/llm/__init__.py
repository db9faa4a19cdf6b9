"""Models: one contract, several providers. Siblings of tools, memory and context, which they do not know."""
