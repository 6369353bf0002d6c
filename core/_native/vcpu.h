/* One vCPU's run loop and the KVM calls, all with fixed arguments. */
#ifndef CELLVISOR_VCPU_H
#define CELLVISOR_VCPU_H
#include <stddef.h>
#include <stdint.h>

#define CV_SLOTS 32
#define CV_CONFIG_SIZE 4096
#define CV_TX_RING 65536

/* Why cv_vcpu_run came back. */
#define CV_EXIT_IO 1
#define CV_EXIT_MMIO 2
#define CV_EXIT_KICK 3
#define CV_EXIT_SHUTDOWN 4
#define CV_EXIT_ERROR 5
#define CV_EXIT_HLT 6
#define CV_EXIT_SYSTEM 7

/* What every vCPU of a VM shares with its board: registers that C answers without Python. */
struct cv_board {
    /* ACPI PM timer: 32 bits at pm_timer_port, 3.579545 MHz since pm_timer_zero_ns (CLOCK_MONOTONIC). */
    uint64_t pm_timer_zero_ns;
    uint16_t pm_timer_port;
    /* 16550 at serial_port (0: none). lsr is what a read of LSR gives; tx_fast says that a THR write
       needs no interrupt and no divisor latch, so the byte may go straight to the ring. */
    uint16_t serial_port;
    uint8_t serial_lsr;
    uint8_t serial_tx_fast;
    uint8_t debug_last;
    uint8_t reserved;
    int serial_wake_fd;
    int debug_wake_fd;
    uint32_t tx_head, tx_tail, debug_head, debug_tail;
    uint64_t tx_dropped;
    uint8_t tx[65536];
    uint8_t debug[65536];
    /* Boot stages: the last 64 writes to port 0x80 with their CLOCK_MONOTONIC time. */
    uint32_t stage_count;
    uint32_t lock;
    uint64_t stage_ns[64];
    uint8_t stage_code[64];
    uint64_t first_entry_ns;
    /* PCI bus 0, function 0 of each slot: what ECAM and CF8/CFC reads give, unless `ask` has the dword. */
    uint64_t ecam_base;
    uint32_t config_address;
    uint8_t present[32];
    uint8_t ask[32][128];
    uint8_t config[32][4096];
};

/* Counters that a test can watch; only the owner vCPU thread writes. */
struct cv_vcpu_counters {
    uint64_t entries, io, mmio, settled, kicks;
};

struct cv_vcpu {
    int fd;
    int index;
    void *run;
    struct cv_board *board;
    struct cv_vcpu_counters counters;
    /* The exit that Python must settle. For a read, put the answer into data before the next run. */
    uint32_t is_write, size, count;
    uint64_t address;
    uint8_t *data;
    uint64_t reason, detail;
};

int cv_install_kick(int signal_number);
int cv_vcpu_run(struct cv_vcpu *vcpu);
void cv_vcpu_immediate_exit(struct cv_vcpu *vcpu, int on);
void *cv_vcpu_map(int fd, size_t size);
int cv_vcpu_unmap(void *run, size_t size);
uint32_t cv_board_take_tx(struct cv_board *board, uint8_t *into, uint32_t room);
uint32_t cv_board_take_debug(struct cv_board *board, uint8_t *into, uint32_t room);
uint64_t cv_monotonic_ns(void);

int cv_ioctl(int fd, unsigned long request, unsigned long argument);
int cv_vm_set_region(int vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size, uint64_t host);
int cv_vm_irq_line(int vm, uint32_t gsi, uint32_t level);
int cv_vm_irqfd(int vm, int fd, uint32_t gsi, uint32_t flags);
int cv_vm_ioeventfd(int vm, int fd, uint64_t address, uint32_t length, uint32_t flags);
int cv_vm_signal_msi(int vm, uint64_t address, uint32_t data);

/* gsi, then address and data of a message; every IOAPIC pin below `pins` is routed besides. */
struct cv_msi_route {
    uint32_t gsi;
    uint32_t data;
    uint64_t address;
};
int cv_vm_set_routes(int vm, uint32_t pins, const struct cv_msi_route *routes, uint32_t count);

/* Architectural state at boot. */
#define CV_ENTRY_PVH 1
#define CV_ENTRY_LONG 2
int cv_vcpu_set_cpuid(int kvm, int fd, uint32_t apic_id, uint32_t vcpus, uint32_t tsc_deadline);
int cv_vcpu_set_entry(int fd, int kind, uint64_t rip, uint64_t boot_params, uint64_t page_tables, uint64_t gdt,
                      uint64_t stack);
int cv_vcpu_set_defaults(int fd, int boot);
/* Guest-physical address bits of this host (CPUID 80000008H), 36 if it does not tell. */
uint32_t cv_phys_bits(void);
int cv_vcpu_get_rip(int fd, uint64_t *rip, uint64_t *cr3);
#endif
