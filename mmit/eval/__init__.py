"""See the module docstrings in mmit/eval."""
