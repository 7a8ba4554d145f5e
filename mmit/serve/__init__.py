"""See the module docstrings in mmit/serve."""
