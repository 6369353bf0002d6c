#!/bin/busybox sh
# Process 1 of the demo's guest: use each device once, say what came of it, power off.
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
modprobe -a virtio_pci virtio_console virtio_blk virtio_rng ext4
tries=0
while { [ ! -c /dev/hvc0 ] || [ ! -b /dev/vda ]; } && [ $tries -lt 100 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
exec <>/dev/hvc0 >&0 2>&1

fail() {
    echo "guest: FAILED: $*"
    poweroff -f
}

# The debug port marks a boot stage: 0x41, the guest runs its own programs.
printf '\101' | dd of=/dev/port bs=1 seek=128 count=1 conv=notrunc 2>/dev/null
echo "guest: $(uname -sr), $(nproc) vCPUs, $(grep MemTotal /proc/meminfo | tr -s ' ')"
echo "guest: up after $(cut -d' ' -f1 /proc/uptime) s of its own time; this text comes through hvc0"
for function in /sys/bus/pci/devices/*; do
    echo "guest: ${function##*/} $(cut -c3- "$function/vendor"):$(cut -c3- "$function/device")"
done
dd if=/dev/hwrng of=/tmp/random bs=4k count=16 2>/dev/null || fail "reading /dev/hwrng"
echo "guest: 64 KiB of entropy from $(cat /sys/class/misc/hw_random/rng_current)"
mount -t ext4 /dev/vda /mnt || fail "mounting /dev/vda"
i=0
while [ $i -lt 64 ]; do
    cat /tmp/random
    i=$((i + 1))
done >/mnt/data || fail "writing to the disk"
written=$(sha256sum </mnt/data)
umount /mnt || fail "unmounting"
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 /dev/vda /mnt || fail "mounting again"
read=$(sha256sum </mnt/data)
[ "$written" = "$read" ] || fail "read back $read, wrote $written"
echo "guest: 4 MiB written, unmounted, mounted again, read back: sha256 ${read%% *}"
umount /mnt
poweroff -f
