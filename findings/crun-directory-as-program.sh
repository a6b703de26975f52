#!/bin/bash
# crun says "Operation not permitted" of a program that is a directory, where runc and the kernel deny it.
#
# Seen: crun 1.8.1 and runc 1.1.5 (Debian 12's packages), Linux 6.18, as root, one bundle whose process.args[0] is
# - /dir, a directory: crun "open executable: Operation not permitted" (EPERM), runc "permission denied" (EACCES), as
#   execve(2) answers for what is no regular file;
# - /file, a regular file that nobody may execute: "Permission denied" from both.
# A client that tells "cannot be executed" from other failures by the words (Docker's answers 126 for "permission
# denied" and 125 for what it does not know) sees an error of another kind from crun for the first alone; and with crun
# it looks like a missing capability or a seccomp rule, which is what EPERM is otherwise a sign of.
set -euo pipefail
[[ $(id -u) == 0 ]] || { echo "run it as root: OCI runtimes want that" >&2; exit 2; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
chmod 755 .
apt-get download --quiet=2 crun=1.8.1-1+deb12u1 runc=1.1.5+ds1-1+deb12u1 libyajl2=2.1.0-3+deb12u2 >/dev/null 2>&1
for package in *.deb; do dpkg-deb -x "$package" root; done
export LD_LIBRARY_PATH=$work/root/usr/lib/x86_64-linux-gnu
crun=$work/root/usr/bin/crun
runc=$work/root/usr/sbin/runc
"$crun" --version | grep -q '^crun version 1\.8\.1$'
"$runc" --version | grep -q '^runc version 1\.1\.5'

mkdir -p bundle/rootfs/{dir,proc,dev,sys}
echo data >bundle/rootfs/file
chmod 644 bundle/rootfs/file

# says RUNTIME PROGRAM OPTION...: what it writes when the bundle's program is that.
says() {
    python3 - "$2" <<'PYTHON'
import json, sys
json.dump({
    "ociVersion": "1.0.2",
    "root": {"path": "rootfs"},
    "process": {"args": [sys.argv[1]], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/"]},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
    "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]},
}, open("bundle/config.json", "w"))
PYTHON
    # crun 1.8.1 starts nothing on a host with both versions of cgroups: it sees one here.
    unshare --mount sh -c 'umount -l /sys/fs/cgroup/unified 2>/dev/null; exec "$@"' sh \
        "$1" "${@:3}" --root "$work/state" run --bundle bundle "probe-$$" 2>&1 </dev/null | tail -1 || true
}

# check NAME PROGRAM WORDS COMMAND...
check() {
    local said
    said=$(says "$4" "$2" "${@:5}")
    echo "$1 $2: $said"
    [[ $said == *"$3"* ]] || { echo "CHANGED: $1 does not say '$3' of $2" >&2; exit 1; }
}
check crun /dir "Operation not permitted" "$crun" --cgroup-manager=disabled
check runc /dir "permission denied" "$runc"
check crun /file "Permission denied" "$crun" --cgroup-manager=disabled
check runc /file "permission denied" "$runc"
