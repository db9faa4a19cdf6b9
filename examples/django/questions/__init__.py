"""Questions of customers, answered by an agent."""
