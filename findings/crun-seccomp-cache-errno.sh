#!/bin/bash
# crun 1.21 gives a container the seccomp errno of another container's profile, if the two differ in nothing else.
#
# Seen: crun 1.21 (Debian 13's package, run by Debian 13's own libc), as root, Linux 6.18: two bundles whose
# config.json differs in linux.seccomp.syscalls[0].errnoRet alone (28, ENOSPC; then 95, EOPNOTSUPP) for mkdir(2), run one
# after the other:
# - with one --root the second one's mkdir says "No space left on device", as the first one's did;
# - with a --root of its own it says "Operation not supported", as its profile wants.
# crun keeps compiled filters below <root>/.cache/seccomp, by a checksum of the profile in which errnoRet has no part.
# (1.28, sid's, did the same in our tests; with 1.8.1, Debian 12's, each had its own.) To a program the difference can be
# all: a C library that is told ENOSYS for a new system call takes the old one, and one that is told EPERM gives up.
set -euo pipefail
[[ $(id -u) == 0 ]] || { echo "run it as root: OCI runtimes want that" >&2; exit 2; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
chmod 755 .
mkdir -p apt/{lists/partial,cache/archives/partial} debs bundle/rootfs/{bin,proc,dev,sys,tmp}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main" >apt/list
private=(-o "Dir::Etc::sourcelist=$work/apt/list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/apt/lists"
    -o "Dir::Cache=$work/apt/cache" -o Debug::NoLocking=1 -o APT::Sandbox::User=root)
apt-get "${private[@]}" --quiet=2 update >/dev/null 2>&1
(cd debs && apt-get "${private[@]}" --quiet=2 download crun=1.21-1 busybox-static libc6 libcap2 libseccomp2 libsystemd0 libyajl2 \
    libselinux1 libpcre2-8-0 libgcrypt20 libgpg-error0 liblz4-1 liblzma5 libzstd1 >/dev/null 2>&1)
for package in debs/*.deb; do dpkg-deb -x "$package" root; done
libraries=$work/root/usr/lib/x86_64-linux-gnu
crun=("$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$work/root/usr/bin/crun")
"${crun[@]}" --version | grep -q '^crun version 1\.21$'
cp root/usr/bin/busybox bundle/rootfs/bin/mkdir

# says ROOT ERRNO: what mkdir says in a container with this profile.
says() {
    python3 - "$2" <<'PYTHON'
import json, sys
json.dump({
    "ociVersion": "1.0.2",
    "root": {"path": "rootfs"},
    "process": {"args": ["/bin/mkdir", "/tmp/never"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"]},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
    "linux": {
        "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")],
        "seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": int(sys.argv[1])},
            ],
        },
    },
}, open("bundle/config.json", "w"))
PYTHON
    unshare --mount sh -c 'umount -l /sys/fs/cgroup/unified 2>/dev/null; exec "$@"' sh \
        "${crun[@]}" --cgroup-manager=disabled --root "$work/$1" run --bundle bundle "probe-$1-$2" 2>&1 </dev/null | tail -1 || true
}

# check ROOT ERRNO WORDS
check() {
    local said
    said=$(says "$1" "$2")
    echo "--root $1, errnoRet $2: $said"
    [[ $said == *"$3"* ]] || { echo "CHANGED: not '$3'" >&2; exit 1; }
}
check one 28 "No space left on device"
check one 95 "No space left on device"
check two 95 "Operation not supported"
