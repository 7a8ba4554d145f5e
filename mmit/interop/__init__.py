"""See the module docstrings in mmit/interop."""
