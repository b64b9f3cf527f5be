# The machine that QEMU emulates: files by 9p, streams by virtio.
mount_root() {
    mkdir -p /lower /rw
    files=trans=virtio,version=9p2000.L,msize=512000,access=any
    mount -t 9p -o "$files,cache=loose,ro" root /lower || fail "cannot mount the root"
    mount -t tmpfs -o size=75% rw /rw && mkdir /rw/upper /rw/work
    mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work overlay /new || fail "cannot mount the overlay"
}
mount_share() { mkdir -p "/new$2" && mount -t 9p -o "$files,cache=mmap" "$1" "/new$2" || fail "cannot share $2"; }
ports() {
    for port in /sys/class/virtio-ports/*; do
        case $($bb cat "$port/name") in
            out) out=/dev/${port##*/} ;;
            err) err=/dev/${port##*/} ;;
            status) status=/dev/${port##*/} ;;
        esac
    done
}
# QEMU is told to end then.
end() { ${bb:-/bin/busybox} reboot -f; }
