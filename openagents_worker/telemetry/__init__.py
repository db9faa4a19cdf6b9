"""Log lines, and what else a deployment is observed by."""
