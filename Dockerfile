# flux-server in a container. It does not run as root, and writes only to its volumes and /tmp.
#
#   docker build -t flux-server .                                 # PyTorch for a GPU, from PyPI
#   docker build -t flux-server --build-arg TORCH_DEVICE=cpu \
#                --build-arg TORCH_INDEX=URL .                    # PyTorch for a CPU, from PyTorch's index of CPU builds
#
# constraints/ fixes the version of every Python package. Debian's packages follow bookworm for security updates.

FROM debian:bookworm-slim AS python
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

# A separate stage lists the dependencies, so that other changes of pyproject.toml do not install them all again.
FROM python AS requirements
WORKDIR /build
COPY pyproject.toml .
RUN python3 -c \
    'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > requirements.txt

# pip stays in this stage: it installs packages into an environment that does not contain pip.
FROM python AS packages
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --without-pip /opt/flux-server
# pip reads PIP_FIND_LINKS: a directory of wheels that is mounted during the build, or the URL of a page.
ARG TORCH_DEVICE=cuda
ARG TORCH_INDEX=""
ARG PIP_FIND_LINKS=""
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY constraints constraints
# Install PyTorch first and alone: otherwise pip would look for the other packages at TORCH_INDEX too.
# hadolint ignore=DL3013,DL3042
RUN pip --python /opt/flux-server/bin/python install -c "constraints/$TORCH_DEVICE.txt" \
    ${TORCH_INDEX:+--index-url="$TORCH_INDEX"} torch
COPY --from=requirements /build/requirements.txt .
# hadolint ignore=DL3042
RUN pip --python /opt/flux-server/bin/python install -c "constraints/$TORCH_DEVICE.txt" -r requirements.txt
# torchao quantizes weights, for smaller GPUs and for the fp8 tiers.
# hadolint ignore=DL3013,DL3042
RUN if /opt/flux-server/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
        pip --python /opt/flux-server/bin/python install -c "constraints/$TORCH_DEVICE.txt" torchao; \
    fi
# --build-arg RAY=1 adds Ray, for clusters.
ARG RAY=""
# hadolint ignore=DL3013,DL3042
RUN if [ -n "$RAY" ]; then pip --python /opt/flux-server/bin/python install -c "constraints/$TORCH_DEVICE.txt" 'ray[default]'; fi
# Remove the libraries' tests, and PyTorch's headers, which only C++ extensions need.
RUN find /opt/flux-server/lib -type d -name tests -path '*/site-packages/*' -prune -exec rm -rf {} + \
    && rm -rf /opt/flux-server/lib/python3.11/site-packages/torch/test \
        /opt/flux-server/lib/python3.11/site-packages/torch/include

# The program is a separate stage, so that an update adds only a small layer.
FROM packages AS program
COPY . .
# hadolint ignore=DL3042
RUN pip --python /opt/flux-server/bin/python install --no-deps --prefix=/program .

FROM python
RUN groupadd --gid 10001 flux \
    && useradd --uid 10001 --gid flux --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin flux \
    && install -d -o flux -g flux -m 0750 /data /models /models/huggingface
COPY --from=packages /opt/flux-server /opt/flux-server
# With CUDA, Triton builds a small C library for the card before it compiles anything. On a CPU nothing is compiled.
# hadolint ignore=DL3008
RUN if /opt/flux-server/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
        apt-get update \
        && apt-get install -y --no-install-recommends gcc libc6-dev libpython3-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=program /program /opt/flux-server
# Listen on all addresses of the container. `docker run -p` decides which addresses of the machine lead to them.
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
# The check uses http.client, because urllib would use a proxy that the environment names.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os; \
connection = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('FLUX_SERVER_PORT', '8000')), timeout=4); \
connection.request('GET', '/health'); \
raise SystemExit(connection.getresponse().status != 200)"]
ENTRYPOINT ["flux-server"]
CMD ["serve", "demo"]
