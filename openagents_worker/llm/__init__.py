"""Model clients: one contract (`base`) and the providers that implement it."""
