#!/usr/bin/env bash
# Builds the image where there is no Docker engine, and has the server in it paint, as the image says: not root, on a
# root that cannot be written to. Wants root, and Debian's buildah, debootstrap, iproute2 and curl.
#
#   tests/project/container/build.sh [PICTURE]   keeps the picture that was painted there
#
# The base is made by debootstrap and only bears the name of the Dockerfile's. Where pip has wheels on disk
# (find-links), they are mounted while building. TORCH_INDEX is what it is in the Makefile. All that is started here
# lives in a process namespace that ends with this script, the server also in a network namespace that has loopback
# and nothing else.
set -euo pipefail

IMAGE=flux-server
USER_ID=10001
PLAIN=http://127.0.0.1:8000
TLS=https://localhost:8443
SIDE=512
# Seconds that each part may take at most.
BASE_LIMIT=600 BUILD_LIMIT=2400 READY_LIMIT=180 PAINT_LIMIT=120 STOP_LIMIT=60

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "FAILED: $*"
    exit 1
}

# buildah with storage of its own; its "vfs" and "chroot" work within containers and sandboxes too.
store() {
    timeout "$BUILD_LIMIT" buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"
}

main() {
    local picture=${1:-} program
    [[ $EUID == 0 ]] || fail "debootstrap and chroot need root"
    for program in buildah debootstrap setpriv unshare nsenter ip pgrep curl; do
        command -v "$program" > /dev/null || fail "$program is not installed"
    done
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/flux-server-image.XXXXXX")
    # It dies with this script even where the script cannot say so any more.
    setpriv --pdeathsig KILL \
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
    # What buildah leaves behind goes with the rest.
    mkdir "$work/tmp"
    export TMPDIR=$work/tmp
    make_base
    build
    unshare --net "${BASH_SOURCE[0]}" --try "$work"
}

# What the Dockerfile's base is, less what only people read. The packages come from debootstrap's own mirror.
make_base() {
    local made base certificates=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
    SECONDS=0
    made=$(store from scratch)
    base=$(store mount "$made")
    timeout "$BASE_LIMIT" debootstrap --variant=minbase --include=ca-certificates bookworm "$base" \
        > "$work/base.log" 2>&1 || { tail -20 "$work/base.log" >&2 && fail "debootstrap"; }
    rm -rf "$base"/var/{cache/apt,lib/apt/lists,log}/* "$base"/usr/share/{doc,man,locale,info}/*
    # Whom this machine trusts, or its package registries might not be reached from inside.
    if [[ -r $certificates ]]; then
        cp "$certificates" "$base/etc/ssl/certs/ca-certificates.crt"
    fi
    store umount "$made" > /dev/null
    store commit --quiet --rm "$made" debian:bookworm-slim > /dev/null
    say "base: made in $SECONDS s"
}

build() {
    local -a links=() places=() mounts=()
    local link
    SECONDS=0
    read -r -a links <<< "$(find_links)" || true
    for link in ${links[@]+"${links[@]}"}; do
        if [[ -d $link ]]; then
            mounts+=(--volume "$link:/mnt/${#mounts[@]}:ro")
            link=/mnt/$((${#mounts[@]} - 2))
        fi
        places+=("$link")
    done
    # The format is Docker's, because OCI's has no health check.
    store bud --isolation chroot --format docker --pull-never --tag "$IMAGE" \
        --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" --build-arg "PIP_FIND_LINKS=${places[*]-}" \
        ${mounts[@]+"${mounts[@]}"} "$repository" \
        > "$work/build.log" 2>&1 || { tail -40 "$work/build.log" >&2 && fail "buildah"; }
    say "image: $(store images --format '{{.Size}}' "$IMAGE"), built in $SECONDS s"
}

# The environment's word goes before the configuration's, as in pip itself.
find_links() {
    if [[ ${PIP_FIND_LINKS:-} ]]; then
        echo "$PIP_FIND_LINKS"
    else
        python3 -m pip config get global.find-links 2> /dev/null | tr '\n' ' '
    fi
}

# In the network namespace: the ports are the image's own, and nobody else's.
try() {
    ip link set lo up
    container=$(store from --pull-never "$IMAGE")
    root=$(store mount "$container")
    # As Docker fills a named volume: with what the image has there, and its owner.
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
    [[ $key ]] || fail "no key was made, though others could reach this server"
    look_at_process
    beside "${health[@]:1}" || fail "the image's health check"
    curl -fsS --cacert "$work/data/tls/ca.pem" "$TLS/health" > /dev/null || fail "TLS"
    paint
    stop
    start
    ! grep -q FAL_KEY= "$work/server.log" || fail "a second key was made"
    curl -fsS "$url" | cmp - "$work/picture.jpg" || fail "the picture did not survive a restart"
    stop
    say "restart: no other key, the same picture"
}

of_image() {
    store inspect --type image --format "$1" "$IMAGE" | sed '/^$/d'
}

# The image's command in the container. The root is read-only when buildah takes it for the container; then buildah,
# which removes its own files from there at the end, may write to it again.
start() {
    SECONDS=0
    touch "$root/run/.containerenv" "$root/etc/hosts" "$root/etc/resolv.conf"
    mount -o remount,bind,ro "$root"
    store run --isolation chroot --volume "$work/data:/data" --volume "$work/models:/models" \
        --volume "$work/scratch:/tmp" "$container" -- "${command[@]}" > "$work/server.log" 2>&1 &
    server=$!
    until curl -fs -o /dev/null "$PLAIN/health/ready"; do
        if ! kill -0 "$server" 2> /dev/null || ((SECONDS > READY_LIMIT)); then
            # Less buildah's own fall over the root that it cannot tidy up.
            sed '/^panic: /,$d' "$work/server.log" >&2
            fail "the server did not get ready"
        fi
        sleep 0.2
    done
    mount -o remount,bind,rw "$root"
    say "server: ready after $SECONDS s"
}

# The number of the server's own process; buildah's beside it belong to that user too.
process() {
    pgrep --uid "$USER_ID" --exact flux-server
}

# A command in the server's container and environment, as `docker exec` runs it.
beside() {
    local id
    local -a environment
    id=$(process)
    mapfile -d '' -t environment < "/proc/$id/environ"
    nsenter --target "$id" --mount --root --wd --setuid "$USER_ID" --setgid "$USER_ID" \
        env --ignore-environment "${environment[@]}" "$@"
}

look_at_process() {
    local id said
    id=$(process) || fail "no server runs as the user $USER_ID"
    grep -Eq "^Uid:(\s+$USER_ID){4}\$" "/proc/$id/status" || fail "the server can be another user than $USER_ID"
    grep -Eq '^CapEff:\s+0+$' "/proc/$id/status" || fail "the server has capabilities"
    # Even root cannot.
    if said=$(LC_ALL=C nsenter --target "$id" --mount --root touch /opt/flux-server/written 2>&1); then
        fail "the root can be written to"
    fi
    [[ $said == *"Read-only file system"* ]] || fail "the root is not read-only but: $said"
    say "server: user $USER_ID, no capabilities, read-only root"
}

paint() {
    local body status size
    local address=$PLAIN/fal-ai/flux/dev
    body="{\"prompt\": \"a red apple\", \"seed\": 1, \"image_size\": {\"width\": $SIDE, \"height\": $SIDE}}"
    status=$(curl -s -o /dev/null -w '%{http_code}' --json "$body" "$address")
    [[ $status == 401 ]] || fail "without the key the answer was $status"
    SECONDS=0
    curl -fsS --max-time "$PAINT_LIMIT" -H "Authorization: Key $key" --json "$body" "$address" > "$work/answer.json" \
        || { cat "$work/server.log" >&2 && fail "no picture was painted"; }
    url=$(sed -E 's/.*"url": ?"([^"]+)".*/\1/' "$work/answer.json")
    curl -fsS -o "$work/picture.jpg" "$url"
    size=$(beside python -c 'import sys, PIL.Image; print(*PIL.Image.open(sys.stdin.buffer).size)' \
        < "$work/picture.jpg")
    [[ $size == "$SIDE $SIDE" ]] || fail "the picture is of $size pixels"
    say "picture: ${size/ / × } pixels, $(stat -c %s "$work/picture.jpg") bytes, in $SECONDS s"
}

stop() {
    local id tries=0
    id=$(process)
    kill -TERM "$id"
    while kill -0 "$id" 2> /dev/null; do
        ((++tries < STOP_LIMIT * 5)) || fail "the server did not stop"
        sleep 0.2
    done
    wait "$server" || fail "the server ended with $?"
}

case ${1:-} in
    --inside) work=$2 && inside ;;
    --try) work=$2 && try ;;
    *) main "$@" ;;
esac
