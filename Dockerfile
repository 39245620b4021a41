# flux-server in a container: not root, nothing to write to but its volumes and /tmp.
#
#   docker build -t flux-server .                              # PyTorch with CUDA, from PyPI
#   docker build -t flux-server --build-arg TORCH_INDEX=URL .  # PyTorch from there, such as its index of CPU builds
#
# Every package is of the version in constraints.txt. Debian's own follow bookworm, to have its security updates.

FROM debian:bookworm-slim AS python
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

# What is to be installed, apart: another version or lint rule in pyproject.toml does not install it all anew.
FROM python AS requirements
WORKDIR /build
COPY pyproject.toml .
RUN python3 -c \
    'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > requirements.txt

# pip stays in this stage: it installs from outside into an environment that has none.
FROM python AS packages
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --without-pip /opt/flux-server
# pip reads PIP_FIND_LINKS by itself: a directory of wheels that is mounted while building, or the URL of a page.
ARG TORCH_INDEX=""
ARG PIP_FIND_LINKS=""
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY constraints.txt .
# PyTorch by itself first: asked for together, the other packages would be looked up at its index too.
# hadolint ignore=DL3013,DL3042
RUN pip --python /opt/flux-server/bin/python install -c constraints.txt ${TORCH_INDEX:+--index-url="$TORCH_INDEX"} torch
COPY --from=requirements /build/requirements.txt .
# hadolint ignore=DL3042
RUN pip --python /opt/flux-server/bin/python install -c constraints.txt -r requirements.txt
# The fp8 tiers, where PyTorch is built for CUDA.
# hadolint ignore=DL3013,DL3042
RUN if /opt/flux-server/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
        pip --python /opt/flux-server/bin/python install -c constraints.txt torchao; \
    fi
# A cluster's own tools, where they are asked for: --build-arg RAY=1.
ARG RAY=""
# hadolint ignore=DL3013,DL3042
RUN if [ -n "$RAY" ]; then pip --python /opt/flux-server/bin/python install -c constraints.txt 'ray[default]'; fi
# Libraries' tests, and PyTorch's headers, which are of use to compilers only: there is none here.
RUN find /opt/flux-server/lib -type d -name tests -path '*/site-packages/*' -prune -exec rm -rf {} + \
    && rm -rf /opt/flux-server/lib/python3.11/site-packages/torch/test \
        /opt/flux-server/lib/python3.11/site-packages/torch/include

# The program by itself, so that an update of it is a small layer on top.
FROM packages AS program
COPY . .
# hadolint ignore=DL3042
RUN pip --python /opt/flux-server/bin/python install --no-deps --prefix=/program .

FROM python
RUN groupadd --gid 10001 flux \
    && useradd --uid 10001 --gid flux --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin flux \
    && install -d -o flux -g flux -m 0750 /data /models /models/huggingface
COPY --from=packages /opt/flux-server /opt/flux-server
# Triton builds a small C library for the card before it compiles anything; on a CPU nothing is compiled.
# hadolint ignore=DL3008
RUN if /opt/flux-server/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
        apt-get update \
        && apt-get install -y --no-install-recommends gcc libc6-dev libpython3-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=program /program /opt/flux-server
# On all addresses of the container: what of the machine leads here is said when it is started.
ENV PATH=/opt/flux-server/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FLUX_SERVER_HOST=0.0.0.0 \
    FLUX_SERVER_DATA_DIR=/data \
    HF_HOME=/models/huggingface \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/data", "/models"]
EXPOSE 8000 8443
USER 10001:10001
WORKDIR /data
STOPSIGNAL SIGTERM
# http.client, because urllib would go through a proxy that the environment names.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os; \
connection = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('FLUX_SERVER_PORT', '8000')), timeout=4); \
connection.request('GET', '/health'); \
raise SystemExit(connection.getresponse().status != 200)"]
ENTRYPOINT ["flux-server"]
CMD ["serve", "demo"]
