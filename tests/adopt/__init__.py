"""Adopting: putting runs into a product that exists."""
