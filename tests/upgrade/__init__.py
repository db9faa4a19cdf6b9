"""Upgrades. The previous commit of this repository and this one at work together, on one Redis, one queue."""
