"""See the module docstrings in mmit/models/interop."""
