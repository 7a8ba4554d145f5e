"""See the module docstrings in mmit/data."""
