"""Memory: what a session keeps from run to run."""
