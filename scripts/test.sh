#!/usr/bin/env bash
# Set up if needed, then run the tests. Arguments go to pytest: `bash scripts/test.sh -m slow`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ruff check .
mypy
lint-imports --no-cache >/dev/null || lint-imports --no-cache
if [ $# -eq 0 ]; then
  export OMP_NUM_THREADS=1 # a core for each process
  pytest --numprocesses 2 --dist loadfile # two cores are what the time limits are stated for
else
  pytest "$@"
fi
