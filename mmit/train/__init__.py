"""See the module docstrings in mmit/train."""
