"""Installing: a wheel in an empty environment, as its users have it (make test-extras)."""
