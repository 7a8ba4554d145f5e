# mmit with its extras.
#   CPU:   docker build -t mmit .
#   CUDA:  docker build -t mmit:cuda --build-arg DEVICE=cuda .     then: docker run --gpus all mmit:cuda env
# The CUDA wheels of torch bring the CUDA libraries; the host needs its driver and the NVIDIA container toolkit alone.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# cpu: wheels without CUDA, 2 GB smaller. cuda: what PyPI has. TORCH_INDEX names another index, for an older driver.
ARG DEVICE=cpu
ARG TORCH_INDEX=
ARG EXTRAS=deepspeed,gguf,hub,parquet
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# DeepSpeed compiles its CPU optimizer and communication at first use.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ ninja-build && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mmit
# Versions are bounded in pyproject.toml; an image that must be repeated bit by bit gives pip a constraints file.
# hadolint ignore=DL3013
RUN case "$DEVICE" in \
      cpu) index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu} ;; \
      cuda) index=${TORCH_INDEX:-https://pypi.org/simple} ;; \
      *) echo "DEVICE is '$DEVICE': give cpu or cuda" >&2; exit 2 ;; \
    esac; \
    pip install --no-cache-dir --index-url "$index" "torch>=2.11" torchvision

COPY pyproject.toml README.md LICENSE ./
COPY mmit ./mmit
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[$EXTRAS]" && useradd --create-home --uid 1000 mmit

USER 1000
WORKDIR /work
ENTRYPOINT ["mmit"]
CMD ["--help"]
