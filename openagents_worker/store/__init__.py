"""The store: the only package that sends commands to Redis."""
