"""What `dare-train run` puts on PYTHONPATH."""
