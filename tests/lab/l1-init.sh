#!/bin/sh
# Process 1 of L1: mounts, modules, then the agent; `lab.shell` on the kernel command line gives a shell instead.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
export CELLVISOR_IN_LAB=1 CELLVISOR_LAB_GUESTS=/lab/guests PYTHONUNBUFFERED=1
mountpoint -q /proc || mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mount -t cgroup2 cgroup /sys/fs/cgroup 2>/dev/null
hostname lab
ip link set lo up
modprobe -q -a kvm_amd virtio_console virtio_net virtio_rng tun
echo 1 >/proc/sys/vm/overcommit_memory
ulimit -c 0
cat >/usr/local/bin/cellvisor <<'END'
#!/bin/sh
exec python3 -c 'import sys; from cellvisor.ctl.cli import main; sys.exit(main())' "$@"
END
chmod +x /usr/local/bin/cellvisor
cd /cellvisor || exit 1
read -r cmdline </proc/cmdline
case $cmdline in
*lab.shell*)
    echo "This is L1. The checkout is in /cellvisor, guest kernels in /lab/guests; 'exit' ends the machine."
    setsid -c bash -c "stty columns ${lab_columns:-80} rows ${lab_rows:-25}; exec bash -l" </dev/ttyS0 >/dev/ttyS0 2>&1
    ;;
*)
    # In the background: process 1 then reaps, while it waits, whatever the tests leave without a parent.
    python3 /cellvisor/tests/lab/agent.py &
    wait $!
    ;;
esac
busybox poweroff -f
