# syntax=docker/dockerfile:1
# fledge in a container:
#
#     docker build --target cpu -t fledge:cpu .
#     docker build --target cuda -t fledge:cuda .
#     docker run --rm --gpus all -v "$PWD:/work" -v fledge-cache:/cache fledge:cuda train --config recipe.yaml
#
# The CUDA libraries come with PyTorch's wheel; the host needs NVIDIA's driver and its container toolkit. Files are
# written as user 1000; `docker run --user "$(id -u)"` makes them yours.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS base
# A C compiler: norms and rotations of few rows, and Triton's kernels, are compiled at their first use. bubblewrap:
# `fledge bench --run-code`. Versions are the base image's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HOME=/cache/huggingface FLEDGE_CACHE=/cache/fledge
RUN useradd --create-home --uid 1000 fledge && mkdir /work /cache && chmod 777 /work /cache
WORKDIR /opt/fledge
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fledge ./fledge

FROM base AS cpu
RUN pip install --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)" \
    && pip install -c constraints.txt ".[gguf]"
USER 1000
WORKDIR /work
ENTRYPOINT ["fledge"]
CMD ["--help"]

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install -c constraints.txt ".[gguf]"
USER 1000
WORKDIR /work
ENTRYPOINT ["fledge"]
CMD ["--help"]
