#!/usr/bin/env bash
# Set up if needed, then run the tests. Arguments go to pytest: `bash scripts/test.sh -m slow`.
# MMIT_ENV=lowest runs them on the lowest versions that pyproject.toml allows.
extras=deepspeed,gguf,test,lint,docs
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ "${MMIT_ENV:-}" != lowest ]; then # types and style are those of the newest versions
  ruff check .
  ruff format --check --quiet .
  mypy
  lint-imports --no-cache >/dev/null || lint-imports --no-cache
  NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict --site-dir "$(mktemp -d)"
fi

unset PYTHONDONTWRITEBYTECODE # else every process compiles mmit and rewrites the asserts of all tests anew
case " $* " in
  *" -m long "*) pytest "$@" ;; # these take both cores, or measure
  *)
    export OMP_NUM_THREADS=1 # a core for each process
    pytest --numprocesses 2 --dist loadfile "$@" # two cores are what the time limits are stated for
    ;;
esac
