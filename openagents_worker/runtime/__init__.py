"""The runtime: carries one run through its attempt, record by record."""
