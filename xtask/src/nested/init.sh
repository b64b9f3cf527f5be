#!/bin/busybox sh
# PID 1 of the emulated machine (busybox only). First in the initial RAM file system: makes the real root at /new.
# Then, below that root, the second half runs the job and sends its exit status.
# What differs between the machines is in machine.sh: mount_root, ports, end.
fail() { echo "L1: $*" >/dev/console; /bin/busybox sleep 1; end; }

if [ "$1" != job ]; then
    export PATH=/bin
    /bin/busybox mkdir -p /proc /sys /dev /new
    /bin/busybox mount -t proc proc /proc
    /bin/busybox mount -t sysfs sys /sys
    /bin/busybox mount -t devtmpfs dev /dev
    /bin/busybox --install -s /bin
    . /machine.sh
    for module in $(cat /modules/order); do
        insmod "/modules/$module.ko" || echo "L1: no module $module" >/dev/console
    done
    mount_root
    for dir in proc sys dev; do mkdir -p /new/$dir; mount --move /$dir /new/$dir || fail "cannot move /$dir"; done
    mkdir -p /new/dev/shm /new/dev/pts
    mount -t tmpfs -o mode=1777,size=90% shm /new/dev/shm
    mount -t devpts -o ptmxmode=666 pts /new/dev/pts
    for dir in tmp run; do mkdir -p /new/$dir; mount -t tmpfs -o mode=1777 $dir /new/$dir; done
    mkdir -p /new/run/lock
    . /job.conf
    mount_shares

    # cgroup v2 with its controllers, as under systemd.
    mount -t cgroup2 -o nsdelegate cgroup2 /new/sys/fs/cgroup || fail "cannot mount cgroup2"
    for controller in cpu memory pids io; do echo +$controller >/new/sys/fs/cgroup/cgroup.subtree_control; done
    mount -t securityfs securityfs /new/sys/kernel/security 2>/dev/null
    echo 1 >/new/sys/kernel/rcu_expedited
    ip link set lo up || ifconfig lo up
    chmod 666 /new/dev/kvm
    hostname nested
    mkdir /new/run/lane
    cp /bin/busybox /init /machine.sh /job /new/run/lane/
    # Not chroot: in a chroot no user namespace can be made, and the process engine needs one.
    exec switch_root /new /run/lane/busybox sh /run/lane/init job
    fail "cannot switch the root"
fi

bb=/run/lane/busybox
. /run/lane/machine.sh
ports
$bb mkfifo /run/lane/out /run/lane/err
$bb cat </run/lane/out >"$out" &
cat_out=$!
$bb cat </run/lane/err >"$err" &
cat_err=$!
# In its own session, so that a job which signals its group does not reach PID 1. By the system's own shell: that of
# busybox would run its own applets for `sh`, `ls` and so on.
$bb setsid /bin/sh /run/lane/job </dev/null >/run/lane/out 2>/run/lane/err &
wait $!
code=$?
# What the job left running may hold its output open for ever.
( $bb sleep 3; kill $cat_out $cat_err 2>/dev/null ) &
wait $cat_out $cat_err
$bb sync
echo $code >"$status"
end
