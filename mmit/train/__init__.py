"""Training: `run.py` is read first, then `loop.py`; the folders hold what they call."""
