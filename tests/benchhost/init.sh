#!/bin/busybox sh
# The bench host's first process: the real machine's file system, read-only, below a tmpfs, as root.
#
# Whatever it cannot do shows on the console, and the kernel panics when this process ends.
set -e
export PATH=/bin
/bin/busybox mkdir -p /bin /proc /sys /dev /host /new
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "$module"; done </modules/order

mount -t virtiofs -o ro host /host
mount -t tmpfs -o size=75% tmpfs /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work overlay /new

mount -t tmpfs -o mode=755 tmpfs /new/run
mkdir /new/run/bench
cp /stage2.sh /job /new/run/bench
for name in dev proc sys; do mount -o move "/$name" "/new/$name"; done
exec switch_root /new /bin/bash /run/bench/stage2.sh
