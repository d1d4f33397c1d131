# The server in a container, for CPUs (the default target) and for NVIDIA GPUs:
#     docker build --target cpu --tag jaxinfer .
#     docker build --target cuda --tag jaxinfer:cuda .
#     docker run --publish 8000:8000 --volume DIR:/model:ro --volume jaxinfer-cache:/cache jaxinfer /model
# docs/server.md has more. Arguments after the image's name are those of `jaxinfer serve`.
ARG PYTHON=3.12-slim-bookworm

FROM docker.io/library/python:${PYTHON} AS build
# Debian keeps one version of a package, so that naming it would break the build later.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY jaxinfer jaxinfer
# With the compiled CPU kernels: the images below have no compiler. On x86-64 a wheel without them fails the build.
RUN JAXINFER_PREBUILT=1 pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && { [ "$(uname -m)" != x86_64 ] || ls /wheels/*x86_64.whl; }

FROM docker.io/library/python:${PYTHON} AS base
# Downloaded models, compiled programs and kernels are kept in /cache.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin jaxinfer \
    && install --directory --owner jaxinfer --group jaxinfer --mode 700 /cache
WORKDIR /home/jaxinfer
VOLUME /cache
EXPOSE 8000
# Loading a large model takes minutes; a failure counts only after them.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["jaxinfer", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]

FROM base AS cuda
# CUDA's libraries come as wheels; the driver is the host's (`docker run --gpus all`, NVIDIA's container toolkit).
ENV CUDA_CACHE_PATH=/cache/cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[serve,cuda13,vision,gguf,sentencepiece]"
USER 10001

FROM base AS cpu
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[serve,vision,gguf,sentencepiece]"
USER 10001
