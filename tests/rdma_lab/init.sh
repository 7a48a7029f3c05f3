#!/bin/busybox sh
# The first process of a lab guest: loads modules, lays a memory file system over this machine's read-only one, runs
# /out/command and leaves its output in /out/log and its exit status in /out/status. Every end of it is a power-off.
B=/bin/busybox
end() { echo "lab: $1"; $B sync; $B poweroff -f; }
load() { for m in $($B cat "/mod/$1"); do $B insmod "/mod/$m.ko" || echo "lab: module $m does not load"; done; }
share() { $B mount -t 9p -o "trans=virtio,version=9p2000.L,msize=524288,$3" "$1" "$2"; }

$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
load base 2>/dev/null
share host /lower ro,cache=loose || end "no view of the host's files (9p)"
share extra /extra ro,cache=loose || end "no view of the lab's files (9p)"
$B mount -t tmpfs tmpfs /rw
$B mkdir -p /rw/upper /rw/work
$B mount -t overlay overlay -o lowerdir=/extra:/lower,upperdir=/rw/upper,workdir=/rw/work /new || end "no overlay"
load rdma
for d in proc sys dev; do $B mount --move /$d /new/$d; done
$B mkdir -p /new/dev/shm /new/dev/pts /new/out
$B mount -t tmpfs -o size=80% shm /new/dev/shm
$B mount -t devpts devpts /new/dev/pts
$B mount -t tmpfs run /new/run
share out /new/out rw || end "nowhere to leave results (9p)"
echo "lab: up after $($B cut -d' ' -f1 /new/proc/uptime) s"
$B chroot /new /bin/sh -c '
    export HOME=/tmp LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 PATH=/usr/sbin:/usr/bin:/sbin:/bin
    ulimit -l unlimited; ulimit -n 65536
    ip link set lo up
    sysctl -qw vm.overcommit_memory=1
    cd /out
    setsid /bin/bash /out/command </dev/null >/out/log 2>&1
    echo $? >/out/status.new; sync; mv /out/status.new /out/status'
end "done after $($B cut -d' ' -f1 /new/proc/uptime) s"
