"""What Flower shows of runs, and what it lets its users do. The only place that knows Flower."""
