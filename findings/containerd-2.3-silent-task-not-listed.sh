#!/bin/bash
# Since 2.3 containerd leaves a task out of its list while the task's shim does not answer; up to 2.2 it lists it.
#
# Seen: containerd 2.2.9 and 2.3.7 (Go modules, Go 1.26), runc 1.1.5 (Debian 12), as root: one running task whose shim
# stands still (SIGSTOP, as a swapped-out or frozen one does), then `ctr task ls`, after the two seconds that
# containerd waits for a shim:
# - 2.2.9 has a line for the task, with the status UNKNOWN;
# - 2.3.7 (and 2.4.2, by its source) has none: exit 0, nothing on stderr, as if there were no such task.
# In both the task is there: after SIGCONT it is listed as RUNNING. Whoever takes the list for what exists (a clean-up
# that removes the state of tasks which are not listed, a monitor that counts them) sees a busy host's tasks come and go.
set -euo pipefail
[[ $(id -u) == 0 ]] || { echo "run it as root: containerd wants that" >&2; exit 2; }
command -v go >/dev/null || { echo "it needs a Go in PATH" >&2; exit 2; }

work=$(mktemp -d)
pids=()
ctr=()
clean() {
    if [[ ${#ctr[@]} != 0 ]]; then
        "${ctr[@]}" task rm -f probe >/dev/null 2>&1 || true
        "${ctr[@]}" container rm probe >/dev/null 2>&1 || true
    fi
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null && wait "$pid" || true; done
    pids=() ctr=()
}
trap 'clean; rm -rf "$work"' EXIT
cd "$work"
apt-get download --quiet=2 runc=1.1.5+ds1-1+deb12u1 busybox-static=1:1.35.0-4+deb12u1+b1 >/dev/null 2>&1
for package in *.deb; do dpkg-deb -x "$package" root; done
mkdir -p rootfs/bin rootfs/proc rootfs/dev rootfs/sys
cp root/bin/busybox rootfs/bin/sleep

# look VERSION: the word after the task's name in the list while its shim stands still; "absent" if it has no line.
look() {
    local bin=$work/$1 shim line
    mkdir -p "$bin"
    GOBIN=$bin GOFLAGS=-buildvcs=false go install \
        github.com/containerd/containerd/v2/cmd/{containerd,ctr,containerd-shim-runc-v2}@"v$1" >&2
    cat >"$bin/config.toml" <<TOML
version = 3
root = "$bin/root"
state = "$bin/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri"]
[grpc]
  address = "$bin/c.sock"
TOML
    PATH=$bin:$work/root/usr/sbin:$PATH "$bin/containerd" --config "$bin/config.toml" >"$bin/log" 2>&1 &
    pids=($!)
    ctr=(env CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 "$bin/ctr" --address "$bin/c.sock")
    for _ in $(seq 300); do "${ctr[@]}" version >/dev/null 2>&1 && break; sleep 0.1; done
    "${ctr[@]}" run --detach --rootfs "$work/rootfs" probe /bin/sleep 1000 >&2
    # The shim is the parent of the task's process.
    shim=$(awk '{print $4}' "/proc/$("${ctr[@]}" task ls | awk '$1 == "probe" {print $2}')/stat")
    kill -STOP "$shim"
    line=$("${ctr[@]}" task ls 2>"$bin/stderr" | awk '$1 == "probe" {print $NF}')
    kill -CONT "$shim"
    [[ ! -s $bin/stderr ]] || cat "$bin/stderr" >&2
    [[ $("${ctr[@]}" task ls | awk '$1 == "probe" {print $NF}') == RUNNING ]]
    said=${line:-absent}
    clean
}

# check VERSION WORD
check() {
    look "$1"
    echo "containerd $1: $said"
    [[ $said == "$2" ]] || { echo "CHANGED: containerd $1 says '$said', not '$2'" >&2; exit 1; }
}
check 2.2.9 UNKNOWN
check 2.3.7 absent
