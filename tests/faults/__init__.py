"""Faults: real workers, a real Redis, a real model server, and what dies between them."""
