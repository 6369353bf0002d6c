#!/bin/busybox sh
# /init of L1's initramfs: mount the root image, unpack the checkout into it, go there.
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
modprobe -a virtio_pci virtio_blk crc32c_generic ext4
mkdir /new
mount -t ext4 -o noatime /dev/vda /new || exec sh
mount -t tmpfs tree /new/cellvisor
tar -x -f /dev/vdb -C /new/cellvisor
mount --move /dev /new/dev
umount /sys
exec switch_root /new /bin/sh /cellvisor/tests/lab/l1-init.sh
