"""A run that watches its own memory; test_partition.py starts it on every rank.

python -m tests.train.engines.memory_case CONFIG, with the launcher's environment. Prints one JSON line: the most memory
of its own (not that of mapped files) this rank held above what it had before the model, in MiB.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path

import mmit.train.parts as parts_module
import mmit.train.run as run_module
from mmit.config import load_config

status = Path("/proc/self/status")


def own_mib() -> float:
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
    assert found
    return int(found.group(1)) / 1024


class Peak(threading.Thread):
    """Samples every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_mib = self.most = own_mib()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.003):
            self.most = max(self.most, own_mib())


def main(path: str) -> None:
    peaks = {}
    real_assemble, real_train = parts_module._assemble, run_module.train

    def assemble(*args, **kwargs):
        peaks["all"] = Peak()
        peaks["all"].start()
        found = real_assemble(*args, **kwargs)
        peaks["loaded"] = peaks["all"].most - peaks["all"].start_mib
        return found

    def train(*args, **kwargs):
        peaks["ready"] = peaks["all"].most - peaks["all"].start_mib
        return real_train(*args, **kwargs)

    parts_module._assemble, run_module.train = assemble, train
    assert run_module.run(load_config(path)) == 0
    peak = peaks.pop("all")
    peak.done.set()
    sys.stdout.write(json.dumps({**peaks, "whole run": peak.most - peak.start_mib}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
