"""Several runs in the same ranks: python -m tests.train.run_many CONFIG ..., with a launcher's environment."""

from __future__ import annotations

import sys

from mmit.config import load_config
from mmit.train.run import run

if __name__ == "__main__":
    for path in sys.argv[1:]:
        assert run(load_config(path)) == 0, path
        sys.stdout.write(f"done {path}\n")
        sys.stdout.flush()
