# mmit with its extras.
#   CUDA:  docker build -t mmit:cuda .     then: docker run --gpus all mmit:cuda env
#   CPU:   docker build -t mmit --build-arg TORCH_INDEX=URL .     URL: PyTorch's index of wheels without CUDA
#   Serve: docker run --gpus all -p 8000:8000 -v "$PWD:/data" mmit:cuda serve runs/mine --host 0.0.0.0 --api-key KEY
# The CUDA wheels of torch bring the CUDA libraries; the host needs its driver and the NVIDIA container toolkit alone.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# Where torch comes from, if not from the default index: wheels without CUDA are 2 GB smaller, others suit older drivers.
ARG TORCH_INDEX=
ARG EXTRAS=deepspeed,gguf,hub,parquet,serve
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# DeepSpeed compiles its CPU optimizer and communication at first use.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ ninja-build && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mmit
# Versions are bounded in pyproject.toml; an image that must be repeated bit by bit gives pip a constraints file.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.11" torchvision

COPY pyproject.toml README.md LICENSE ./
COPY mmit ./mmit
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[$EXTRAS]" && useradd --create-home --uid 1000 mmit

USER 1000
WORKDIR /data
ENTRYPOINT ["mmit"]
CMD ["--help"]
