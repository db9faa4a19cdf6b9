"""Faults: real workers, a real Redis and a real model server, with killed processes and cut connections."""
