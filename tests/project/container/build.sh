#!/usr/bin/env bash
# Builds the container image without a Docker engine, runs it as the image specifies (not as root, on a read-only root
# file system), and generates an image with the server in it. Needs root, and Debian's buildah, debootstrap, iproute2
# and curl.
#
#   tests/project/container/build.sh [OUTPUT]   copies the generated image to OUTPUT
#
# debootstrap makes the base image, which only has the name of the Dockerfile's base. If pip is configured with local
# wheels (find-links), they are mounted during the build. TORCH_DEVICE and TORCH_INDEX mean the same as in the Makefile,
# but TORCH_DEVICE is cpu by default: for cuda, the build needs some 60 GB of disk for a while. All processes run in a
# process namespace that ends with this script. The server also runs in a network namespace that has only
# loopback.
set -euo pipefail

IMAGE=flux-server
DEVICE=${TORCH_DEVICE:-cpu}
USER_ID=10001
PLAIN=http://127.0.0.1:8000
TLS=https://localhost:8443
SIDE=512
# The time limit of each part, in seconds.
BASE_LIMIT=600 BUILD_LIMIT=2400 READY_LIMIT=180 GENERATE_LIMIT=120 STOP_LIMIT=60

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "FAILED: $*"
    exit 1
}

# Runs buildah with separate storage. Its "vfs" and "chroot" modes also work in containers and sandboxes.
store() {
    timeout "$BUILD_LIMIT" buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"
}

main() {
    local output=${1:-} program
    [[ $EUID == 0 ]] || fail "debootstrap and chroot need root"
    for program in buildah debootstrap setpriv unshare nsenter ip pgrep curl; do
        command -v "$program" > /dev/null || fail "$program is not installed"
    done
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/flux-server-image.XXXXXX")
    # If the script is killed and cannot clean up, the kernel kills this process too.
    setpriv --pdeathsig KILL \
        unshare --mount --pid --fork --kill-child --mount-proc "${BASH_SOURCE[0]}" --inside "$work" &
    inside=$!
    trap 'kill -KILL "$inside" 2> /dev/null || true; wait || true; rm -rf "$work"' EXIT
    trap 'exit 143' INT TERM
    wait "$inside"
    if [[ $output ]]; then
        cp "$work/generated.jpg" "$output"
    fi
}

inside() {
    # Keep buildah's temporary files in $work, which is deleted at the end.
    mkdir "$work/tmp"
    export TMPDIR=$work/tmp
    make_base
    build
    unshare --net "${BASH_SOURCE[0]}" --try "$work"
}

# Makes the base of the Dockerfile, without documentation. The packages come from debootstrap's default mirror.
make_base() {
    local container base certificates=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
    SECONDS=0
    container=$(store from scratch)
    base=$(store mount "$container")
    timeout "$BASE_LIMIT" debootstrap --variant=minbase --include=ca-certificates bookworm "$base" \
        > "$work/base.log" 2>&1 || { tail -20 "$work/base.log" >&2 && fail "debootstrap could not make the base"; }
    rm -rf "$base"/var/{cache/apt,lib/apt/lists,log}/* "$base"/usr/share/{doc,man,locale,info}/*
    # Copy the certificates that this machine trusts: without them the build may not reach the package registries.
    if [[ -r $certificates ]]; then
        cp "$certificates" "$base/etc/ssl/certs/ca-certificates.crt"
    fi
    store umount "$container" > /dev/null
    store commit --quiet --rm "$container" debian:bookworm-slim > /dev/null
    say "base: made in $SECONDS s"
}

build() {
    local -a links=() sources=() mounts=()
    local link
    SECONDS=0
    read -r -a links <<< "$(find_links)" || true
    for link in ${links[@]+"${links[@]}"}; do
        if [[ -d $link ]]; then
            mounts+=(--volume "$link:/mnt/${#mounts[@]}:ro")
            link=/mnt/$((${#mounts[@]} - 2))
        fi
        sources+=("$link")
    done
    # Use Docker's format, because the OCI format has no health check.
    store bud --isolation chroot --format docker --pull-never --tag "$IMAGE" \
        --build-arg "TORCH_DEVICE=$DEVICE" --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" --build-arg "PIP_FIND_LINKS=${sources[*]-}" \
        ${mounts[@]+"${mounts[@]}"} "$repository" \
        > "$work/build.log" 2>&1 || { tail -40 "$work/build.log" >&2 && fail "buildah could not build the image"; }
    say "image: $(store images --format '{{.Size}}' "$IMAGE"), built in $SECONDS s"
}

# Prints pip's find-links. The environment takes precedence over pip's configuration, as in pip itself.
find_links() {
    if [[ ${PIP_FIND_LINKS:-} ]]; then
        echo "$PIP_FIND_LINKS"
    else
        python3 -m pip config get global.find-links 2> /dev/null | tr '\n' ' '
    fi
}

# Runs in the network namespace, where no other program uses the ports of the image.
try() {
    ip link set lo up
    container=$(store from --pull-never "$IMAGE")
    root=$(store mount "$container")
    # Fill the volumes as Docker fills a named volume: with the content of the image and its owner.
    cp -a "$root/data" "$root/models" "$work/"
    mkdir "$work/scratch"
    mount -t tmpfs -o mode=1777,nosuid,nodev,noexec tmpfs "$work/scratch"
    mount --bind "$root" "$root"
    mapfile -t command < <(
        of_image '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}'
        of_image '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}'
    )
    mapfile -t health < <(of_image '{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}')

    start
    key=$(sed -n 's/.*FAL_KEY=//p' "$work/server.log")
    [[ $key ]] || fail "the server made no key, although other machines could reach it"
    check_process
    in_container "${health[@]:1}" || fail "the health check of the image failed"
    curl -fsS --cacert "$work/data/tls/ca.pem" "$TLS/health" > /dev/null || fail "no answer at $TLS"
    generate
    [[ $DEVICE == cpu ]] || check_cuda
    stop
    start
    ! grep -q FAL_KEY= "$work/server.log" || fail "the server made a second key"
    curl -fsS "$url" | cmp - "$work/generated.jpg" || fail "the generated image did not survive a restart"
    stop
    say "restart: no other key, the same generated image"
}

of_image() {
    store inspect --type image --format "$1" "$IMAGE" | sed '/^$/d'
}

# Runs the command of the image in the container, whose root is read-only. Outside the container the root becomes
# writable again once the server is ready, because buildah removes its own files from the root at the end.
start() {
    SECONDS=0
    touch "$root/run/.containerenv" "$root/etc/hosts" "$root/etc/resolv.conf"
    mount -o remount,bind,ro "$root"
    store run --isolation chroot --volume "$work/data:/data" --volume "$work/models:/models" \
        --volume "$work/scratch:/tmp" "$container" -- "${command[@]}" > "$work/server.log" 2>&1 &
    server=$!
    until curl -fs -o /dev/null "$PLAIN/health/ready"; do
        if ! kill -0 "$server" 2> /dev/null || ((SECONDS > READY_LIMIT)); then
            # Leave out the panic of buildah, which cannot clean up the read-only root.
            sed '/^panic: /,$d' "$work/server.log" >&2
            fail "the server ended or was not ready within $READY_LIMIT s"
        fi
        sleep 0.2
    done
    mount -o remount,bind,rw "$root"
    say "server: ready after $SECONDS s"
}

# Prints the process id of the server. Processes of buildah belong to the same user.
process() {
    pgrep --uid "$USER_ID" --exact flux-server
}

# Runs a command in the container and the environment of the server, as `docker exec` does.
in_container() {
    local id
    local -a environment
    id=$(process)
    mapfile -d '' -t environment < "/proc/$id/environ"
    nsenter --target "$id" --mount --root --wd --setuid "$USER_ID" --setgid "$USER_ID" \
        env --ignore-environment "${environment[@]}" "$@"
}

check_process() {
    local id message
    id=$(process) || fail "no server runs as the user $USER_ID"
    grep -Eq "^Uid:(\s+$USER_ID){4}\$" "/proc/$id/status" || fail "the server can become another user than $USER_ID"
    grep -Eq '^CapEff:\s+0+$' "/proc/$id/status" || fail "the server has capabilities"
    # Even root cannot write to the root file system.
    if message=$(LC_ALL=C nsenter --target "$id" --mount --root touch /opt/flux-server/written 2>&1); then
        fail "the root file system is writable"
    fi
    [[ $message == *"Read-only file system"* ]] || fail "writing to the root failed for another reason: $message"
    say "server: user $USER_ID, no capabilities, read-only root"
}

# Without a GPU, the server has said why it computes on the CPU. What it needs for a GPU is there nevertheless.
check_cuda() {
    grep -q "no GPU is used: PyTorch" "$work/server.log" || fail "the server did not say why it uses no GPU"
    in_container python - < "$repository/tests/project/container/check_cuda.py" >&2 || fail "CUDA would not work"
}

generate() {
    local body status size
    local endpoint=$PLAIN/fal-ai/flux/dev
    body="{\"prompt\": \"a red apple\", \"seed\": 1, \"image_size\": {\"width\": $SIDE, \"height\": $SIDE}}"
    status=$(curl -s -o /dev/null -w '%{http_code}' --json "$body" "$endpoint")
    [[ $status == 401 ]] || fail "without the key the answer was $status"
    SECONDS=0
    curl -fsS --max-time "$GENERATE_LIMIT" -H "Authorization: Key $key" --json "$body" "$endpoint" \
        > "$work/answer.json" || { cat "$work/server.log" >&2 && fail "no image was generated"; }
    url=$(sed -E 's/.*"url": ?"([^"]+)".*/\1/' "$work/answer.json")
    curl -fsS -o "$work/generated.jpg" "$url"
    size=$(in_container python -c 'import sys, PIL.Image; print(*PIL.Image.open(sys.stdin.buffer).size)' \
        < "$work/generated.jpg")
    [[ $size == "$SIDE $SIDE" ]] || fail "the generated image has $size pixels instead of $SIDE $SIDE"
    say "generated image: ${size/ / × } pixels, $(stat -c %s "$work/generated.jpg") bytes, in $SECONDS s"
}

stop() {
    local id tries=0
    id=$(process)
    kill -TERM "$id"
    while kill -0 "$id" 2> /dev/null; do
        ((++tries < STOP_LIMIT * 5)) || fail "the server did not stop within $STOP_LIMIT s"
        sleep 0.2
    done
    wait "$server" || fail "the server ended with exit code $?"
}

case ${1:-} in
    --inside) work=$2 && inside ;;
    --try) work=$2 && try ;;
    *) main "$@" ;;
esac
