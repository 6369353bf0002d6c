#!/bin/busybox sh
# Process 1 of a guest under test: an agent that runs one line at a time on the console named by lab_agent=.
#   host: NONCE COMMAND      guest: its output, then @@NONCE STATUS      at start: @@ready UPTIME
export PATH=/bin:/sbin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
modprobe -a virtio_pci virtio_console virtio_blk virtio_rng
# BDF, class, vendor:device; Debian's busybox has no lspci.
lspci() {
    for function in /sys/bus/pci/devices/*; do
        read -r class <"$function/class"
        read -r vendor <"$function/vendor"
        read -r device <"$function/device"
        echo "${function##*/0000:} ${class#0x} ${vendor#0x}:${device#0x}"
    done
}
agent=/dev/${lab_agent:-hvc0}
tries=0
while [ ! -c "$agent" ] && [ $tries -lt 100 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
if [ ! -c "$agent" ]; then
    echo "lab: no $agent in this guest" >/dev/console
    ls /dev >/dev/console
    poweroff -f
fi
exec <"$agent" >"$agent" 2>&1
stty raw -echo
echo "@@ready $(cut -d' ' -f1 /proc/uptime)"
while read -r nonce line; do
    (eval "$line") </dev/null
    echo "@@$nonce $?"
done
poweroff -f
