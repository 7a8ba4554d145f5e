#!/usr/bin/env bash
# Set up if needed, then run the tests. Arguments go to pytest: `bash scripts/test.sh -m slow`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ruff check .
mypy
lint-imports --no-cache >/dev/null || lint-imports --no-cache
pytest "$@"
