# The bench host's init on the real machine's file system: furnish, run the job, report, power off.
#
# /run/bench/job begins with the lines that machine.py puts there: MODULES, RELEASE, MODULE_TREE, SHARES,
# INTERACTIVE.
# Ports: fd 8 takes the job's output, fd 9 the control lines ("ready", "exit N", and whatever the job says).
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=linux
export KATA_BENCH_HOST=1
source /run/bench/job

for port in /sys/class/virtio-ports/*; do
    case $(<"$port/name") in
    output) exec 8<>"/dev/${port##*/}" ;;
    control) exec 9<>"/dev/${port##*/}" ;;
    esac
done

# What is asked for below a directory that gets a file system of its own, seen by its name all the same.
keep_shares() {
    local number=0
    while read -r share; do
        [[ -n $share ]] || continue
        mkdir -p "/run/bench/share$((++number))"
        mount --bind "$share" "/run/bench/share$number"
    done <<<"$SHARES"
}

show_shares() {
    local number=0
    while read -r share; do
        [[ -n $share ]] || continue
        mkdir -p "$share"
        mount --bind "/run/bench/share$((++number))" "$share"
    done <<<"$SHARES"
}

furnish() {
    mkdir -p /dev/pts /dev/shm "/usr/lib/modules/$RELEASE"
    mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    keep_shares
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mount -t tmpfs -o mode=1777 tmpfs /var/tmp
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    ln -sfn /proc/self/fd /dev/fd
    # containerd's snapshots are overlays; one on top of this root, itself an overlay, would not mount.
    mkdir -p /var/lib/containerd
    if [[ -b /dev/vda ]]; then
        mkfs.ext4 -q -F -O ^has_journal /dev/vda && mount /dev/vda /var/lib/containerd
    else
        mount -t tmpfs tmpfs /var/lib/containerd
    fi
    mount --bind "$MODULE_TREE/lib/modules/$RELEASE" "/usr/lib/modules/$RELEASE"
    show_shares
    hostname bench-host
    ip link set lo up
    [[ -z $MODULES ]] || modprobe -a $MODULES
}

furnish </dev/null >&8 2>&8
echo ready >&9
cd "$DIRECTORY"
if [[ $INTERACTIVE == 1 ]]; then
    setsid -c bash -c 'stty sane rows "$0" cols "$1"; shift; exec bash -i' "$ROWS" "$COLUMNS" \
        </dev/hvc0 >/dev/hvc0 2>&1 8>&- 9>&-
else
    # The job may talk on fd 9 too; its stdin is empty, so that nothing can wait for an answer.
    BENCH_CONTROL_FD=9 bash -c "$JOB" </dev/null >&8 2>&8 8>&-
fi
echo "exit $?" >&9
sync
busybox poweroff -f
