#!/usr/bin/env bash
# Builds the image where there is no Docker engine, and has the server in it paint, as the image says: not root, on a
# root that cannot be written to. Wants root, and Debian's buildah, debootstrap, iproute2 and curl.
#
#   tests/container/build.sh [PICTURE]   keeps the picture that was painted there
#
# The base is made by debootstrap and only bears the name of the Dockerfile's. Where pip has wheels on disk (find-links),
# they are mounted while building. TORCH_INDEX is what it is in the Makefile. All that is started here lives in a process
# namespace that ends with this script, the server also in a network namespace that has loopback and nothing else.
set -euo pipefail

IMAGE=flux-server
PLAIN=http://127.0.0.1:8000
TLS=https://localhost:8443
SIDE=512
# Seconds that each part may take at most.
BASE_LIMIT=600 BUILD_LIMIT=2400 READY_LIMIT=180 PAINT_LIMIT=120 STOP_LIMIT=60

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "FAILED: $*"
    exit 1
}

# buildah with storage of its own; "vfs" and "chroot" work in containers and sandboxes too.
store() {
    command buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"
}

main() {
    local picture=${1:-} program
    [[ $EUID == 0 ]] || fail "this needs root: debootstrap and chroot do"
    for program in buildah debootstrap unshare ip curl; do
        command -v "$program" > /dev/null || fail "$program is not installed"
    done
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/flux-server-image.XXXXXX")
    unshare --mount --pid --fork --kill-child --mount-proc "${BASH_SOURCE[0]}" --inside "$work" &
    inside=$!
    trap 'kill -KILL "$inside" 2> /dev/null || true; wait || true; rm -rf "$work"' EXIT
    trap 'exit 143' INT TERM
    wait "$inside"
    if [[ $picture ]]; then
        cp "$work/picture.jpg" "$picture"
    fi
}

inside() {
    make_base
    build
    unshare --net "${BASH_SOURCE[0]}" --try "$work"
}

# What the Dockerfile's base is, less what only people read. Debian's packages come from debootstrap's own mirror.
make_base() {
    local container root certificates=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
    SECONDS=0
    container=$(store from scratch)
    root=$(store mount "$container")
    timeout "$BASE_LIMIT" debootstrap --variant=minbase --include=ca-certificates bookworm "$root" > "$work/base.log" 2>&1 \
        || { tail -20 "$work/base.log" >&2 && fail "debootstrap"; }
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale,info}/* "$root"/var/log/*
    # Whom this machine trusts, or its package registries might not be reached from inside.
    if [[ -r $certificates ]]; then
        cp "$certificates" "$root/etc/ssl/certs/ca-certificates.crt"
    fi
    store umount "$container" > /dev/null
    store commit --quiet --rm "$container" debian:bookworm-slim > /dev/null
    say "base: made in $SECONDS s"
}

build() {
    local -a options=() links=()
    local link place number=0
    SECONDS=0
    # The environment's word goes before the configuration's, as pip itself has it.
    read -r -a links <<< "${PIP_FIND_LINKS:-$(pip_find_links)}"
    local told=""
    for link in ${links[@]+"${links[@]}"}; do
        place=$link
        if [[ -d $link ]]; then
            number=$((number + 1))
            place=/wheels/$number
            options+=(--volume "$link:$place:ro")
        fi
        told+="$place "
    done
    # The format is Docker's, because OCI's has no health check.
    timeout "$BUILD_LIMIT" buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs bud \
        --isolation chroot --format docker --pull-never --tag "$IMAGE" \
        --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" --build-arg "PIP_FIND_LINKS=${told% }" \
        ${options[@]+"${options[@]}"} "$repository" > "$work/build.log" 2>&1 \
        || { tail -40 "$work/build.log" >&2 && fail "buildah"; }
    say "image: built in $SECONDS s, $(store images --format '{{.Size}}' "$IMAGE")"
}

pip_find_links() {
    python3 -m pip config get global.find-links 2> /dev/null || true
}

# In the network namespace: the same ports as in the container, and nobody else's.
try() {
    ip link set lo up
    container=$(store from --pull-never "$IMAGE")
    root=$(store mount "$container")
    # As Docker fills a named volume: with what the image has there, and its owner.
    cp -a "$root/data" "$root/models" "$work/"
    mount --bind "$root" "$root"
    mount -o remount,bind,ro "$root"
    mapfile -t command < <(of_image '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}'
        of_image '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}')
    mapfile -t health < <(of_image '{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}')

    start "${command[@]}"
    key=$(sed -n 's/.*FAL_KEY=//p' "$work/server.log")
    [[ $key ]] || fail "no key was made, though others could reach this server"
    look_at_process
    within "${health[@]:1}" || fail "the health check"
    curl -fsS --cacert "$work/data/tls/ca.pem" "$TLS/health" > /dev/null || fail "TLS"
    paint
    stop
    start "${command[@]}"
    ! grep -q FAL_KEY= "$work/server.log" || fail "a second key was made"
    curl -fsS "$url" | cmp - "$work/picture.jpg" || fail "the picture was lost in a restart"
    stop
    say "restart: the same key, the same picture"
}

of_image() {
    store inspect --type image --format "$1" "$IMAGE" | sed '/^$/d'
}

# A command in the container, as the image's user.
within() {
    store run --isolation chroot --volume "$work/data:/data" --volume "$work/models:/models" \
        --mount type=tmpfs,destination=/tmp "$container" -- "$@"
}

start() {
    SECONDS=0
    within "$@" > "$work/server.log" 2>&1 &
    server=$!
    until curl -fs -o /dev/null "$PLAIN/health/ready"; do
        if ! kill -0 "$server" 2> /dev/null || ((SECONDS > READY_LIMIT)); then
            cat "$work/server.log" >&2
            fail "the server did not get ready"
        fi
        sleep 0.2
    done
    say "server: ready after $SECONDS s"
}

# The process that listens: alone in its namespace with its user's number.
process() {
    pgrep --uid "$(of_image '{{.OCIv1.Config.User}}' | cut -d: -f1)" | head -1
}

look_at_process() {
    local id
    id=$(process)
    [[ $id ]] || fail "no process has the image's user"
    grep -Eq '^Uid:(\s+10001){4}$' "/proc/$id/status" || fail "the server is not the user 10001"
    grep -Eq '^CapEff:\s+0+$' "/proc/$id/status" || fail "the server has capabilities"
    awk '$5 == "/" { found = $6 } END { exit found !~ /^ro(,|$)/ }' "/proc/$id/mountinfo" || fail "the root can be written to"
    say "server: user 10001, no capabilities, read-only root"
}

paint() {
    local body size
    body="{\"prompt\": \"a red apple\", \"seed\": 1, \"image_size\": {\"width\": $SIDE, \"height\": $SIDE}}"
    [[ $(curl -s -o /dev/null -w '%{http_code}' --json "$body" "$PLAIN/fal-ai/flux/dev") == 401 ]] || fail "no key was asked for"
    SECONDS=0
    curl -fsS --max-time "$PAINT_LIMIT" -H "Authorization: Key $key" --json "$body" "$PLAIN/fal-ai/flux/dev" > "$work/answer.json" \
        || fail "no answer"
    url=$(sed -E 's/.*"url": ?"([^"]+)".*/\1/' "$work/answer.json")
    curl -fsS -o "$work/picture.jpg" "$url"
    size=$(within python -c 'import sys; from PIL import Image; print(*Image.open(sys.stdin.buffer).size)' < "$work/picture.jpg")
    [[ $size == "$SIDE $SIDE" ]] || fail "the picture is $size"
    say "picture: $size pixels, $(stat -c %s "$work/picture.jpg") bytes, in $SECONDS s"
}

stop() {
    local id waited=0
    id=$(process)
    kill -TERM "$id"
    while kill -0 "$id" 2> /dev/null; do
        ((waited++ < STOP_LIMIT * 5)) || fail "the server did not stop"
        sleep 0.2
    done
    wait "$server" || fail "the server ended with $?"
}

case ${1:-} in
    --inside) work=$2 && inside ;;
    --try) work=$2 && try ;;
    *) main "$@" ;;
esac
