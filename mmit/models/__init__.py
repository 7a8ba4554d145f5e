"""See the module docstrings in mmit/models."""

import logging

# A wish for a faster kernel, at every start on a CPU: the layers work without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
