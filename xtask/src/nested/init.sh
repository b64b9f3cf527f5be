#!/bin/busybox sh
# PID 1 of the emulated machine (busybox only). First in the initial RAM file system: mounts this machine's files.
# Then, below the real root, the second half runs the job and sends its exit status.
fail() { echo "L1: $*" >/dev/console; /bin/busybox reboot -f; }

if [ "$1" != job ]; then
    export PATH=/bin
    /bin/busybox mkdir -p /proc /sys /dev /lower /rw /new
    /bin/busybox mount -t proc proc /proc
    /bin/busybox mount -t sysfs sys /sys
    /bin/busybox mount -t devtmpfs dev /dev
    /bin/busybox --install -s /bin
    for module in $(cat /modules/order); do
        insmod "/modules/$module.ko" || echo "L1: no module $module" >/dev/console
    done
    files=trans=virtio,version=9p2000.L,msize=512000,access=any
    mount -t 9p -o "$files,cache=loose,ro" root /lower || fail "cannot mount the root"
    mount -t tmpfs -o size=75% rw /rw && mkdir /rw/upper /rw/work
    mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work overlay /new || fail "cannot mount the overlay"
    for dir in proc sys dev; do mount --move /$dir /new/$dir || fail "cannot move /$dir"; done
    mkdir -p /new/dev/shm /new/dev/pts
    mount -t tmpfs -o mode=1777,size=90% shm /new/dev/shm
    mount -t devpts -o ptmxmode=666 pts /new/dev/pts
    for dir in tmp run; do mkdir -p /new/$dir; mount -t tmpfs -o mode=1777 $dir /new/$dir; done
    mkdir -p /new/run/lock
    mount_share() { mkdir -p "/new$2" && mount -t 9p -o "$files,cache=mmap" "$1" "/new$2" || fail "cannot share $2"; }
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
    cp /bin/busybox /init /job /new/run/lane/
    # Not chroot: in a chroot no user namespace can be made, and the process engine needs one.
    exec switch_root /new /run/lane/busybox sh /run/lane/init job
    fail "cannot switch the root"
fi

bb=/run/lane/busybox
for port in /sys/class/virtio-ports/*; do
    case $($bb cat "$port/name") in
        out) out=/dev/${port##*/} ;;
        err) err=/dev/${port##*/} ;;
        status) status=/dev/${port##*/} ;;
    esac
done
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
$bb reboot -f
