"""LLaVA's training command as an mmit config: takes the flags of `llava/train/train_mem.py` and prints the YAML.

python scripts/llava_train.py --model_name_or_path ... --data_path ... > run.yaml && mmit train --config run.yaml
"""

from __future__ import annotations

import os
import sys

from mmit.cli.errors import EXIT_ERROR, show_error
from mmit.config import Config
from mmit.errors import MmitError
from mmit.interop.llava_flags import config_from_flags


def main() -> int:
    """Print the config of the command line on stdout and notes on stderr."""
    try:
        raw, notes = config_from_flags(sys.argv[1:], ranks=int(os.environ.get("WORLD_SIZE", "1")))
        text = Config.from_dict(raw, where="LLaVA's flags").to_yaml()
    except MmitError as error:
        show_error(error)
        return EXIT_ERROR
    for note in notes:
        print(note, file=sys.stderr)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
