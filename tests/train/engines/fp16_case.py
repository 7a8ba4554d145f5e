"""A run in fp16 on the CPU, where torch computes in it but DeepSpeed refuses; run by test_fp16.py.

python -m tests.train.engines.fp16_case CONFIG, with the launcher's environment.
"""

from __future__ import annotations

import sys

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from mmit.config import load_config
from mmit.train.run import run

if __name__ == "__main__":
    CPU_Accelerator.is_fp16_supported = lambda self: True
    sys.exit(run(load_config(sys.argv[1])))
