"""The original SDK: its plugins, with and without its package. The package is never imported here."""
