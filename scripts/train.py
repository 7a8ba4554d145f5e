"""Training for the DeepSpeed launcher: the same as `mmit train`.

deepspeed --num_gpus N scripts/train.py --config configs/train/X.yaml key=value ...
"""

import sys

from mmit.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
