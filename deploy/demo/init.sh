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
# In small steps that reach the disk one by one; whoever sees the next line kills the disk's process.
echo "guest: writing to the disk, each write timed"
now() { # in hundredths of a second
    read -r up _ </proc/uptime
    echo "${up%.*}${up#*.}"
}
i=0
while [ $i -lt 256 ]; do
    start=$(now)
    dd if=/tmp/random of=/mnt/data bs=16k count=1 seek=$i conv=notrunc,fsync 2>/dev/null || fail "writing to the disk"
    echo $(($(now) - start))0
    i=$((i + 1))
done | sort -n >/tmp/times
echo "guest: $(wc -l </tmp/times) writes, none failed: usually $(sed -n 128p /tmp/times) ms," \
    "the longest $(tail -n 1 /tmp/times) ms"
written=$(sha256sum </mnt/data)
umount /mnt || fail "unmounting"
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 /dev/vda /mnt || fail "mounting again"
read=$(sha256sum </mnt/data)
[ "$written" = "$read" ] || fail "read back $read, wrote $written"
echo "guest: 4 MiB written, unmounted, mounted again, read back: sha256 ${read%% *}"
umount /mnt
poweroff -f
