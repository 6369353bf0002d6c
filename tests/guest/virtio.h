/* virtio-pci (modern) and split rings, as a driver sees them. */
#ifndef GUEST_VIRTIO_H
#define GUEST_VIRTIO_H
#include "pci.h"

#define VIRTIO_NET 1
#define VIRTIO_BLK 2
#define VIRTIO_CONSOLE 3
#define VIRTIO_RNG 4

#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER 2
#define STATUS_DRIVER_OK 4
#define STATUS_FEATURES_OK 8
#define STATUS_NEEDS_RESET 64
#define STATUS_FAILED 128

#define F_INDIRECT (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_VERSION_1 (1ull << 32)

#define DESC_NEXT 1
#define DESC_WRITE 2
#define DESC_INDIRECT 4
#define NO_VECTOR 0xffff
#define MAX_QUEUES 64
#define MAX_SEGMENTS 34

/* Offsets in the common configuration (virtio 1.2, 4.1.4.3). */
enum common {
    C_DEVICE_FEATURE_SELECT = 0, C_DEVICE_FEATURE = 4, C_DRIVER_FEATURE_SELECT = 8, C_DRIVER_FEATURE = 12,
    C_CONFIG_VECTOR = 16, C_NUM_QUEUES = 18, C_STATUS = 20, C_GENERATION = 21, C_QUEUE_SELECT = 22,
    C_QUEUE_SIZE = 24, C_QUEUE_VECTOR = 26, C_QUEUE_ENABLE = 28, C_NOTIFY_OFF = 30, C_DESC = 32, C_DRIVER = 40,
    C_DEVICE = 48,
};

enum irq_mode { IRQ_POLL, IRQ_MSIX, IRQ_INTX };

struct desc {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct avail {
    uint16_t flags, index, ring[];
};

struct used_element {
    uint32_t id, length;
};

struct used {
    uint16_t flags, index;
    struct used_element ring[];
};

struct segment {
    void *address;
    uint32_t length;
    bool device_writes;
};

struct queue {
    struct virtio *device;
    uint16_t index, size, free_head, free_count, next_used, last_kick;
    bool event_idx, indirect;
    unsigned vector;
    volatile struct desc *desc;
    volatile struct avail *avail;
    volatile struct used *used;
    uint64_t notify;
    struct desc *tables;        /* one indirect table of MAX_SEGMENTS for each head */
    void **tokens;              /* by head; NULL: not with the device */
    uint16_t *lengths;          /* descriptors of the chain of each head */
    uint64_t kicks, kicks_avoided;
};

struct virtio {
    struct pci *pci;
    unsigned type;
    uint64_t common, isr, config, notify, msix_table, msix_pba, features;
    uint32_t notify_multiplier, config_size, common_size, isr_size, notify_size;
    unsigned msix_size, queue_count;
    enum irq_mode irq;
    unsigned config_vector;
    struct queue *queues;
};

/* virtio.c */
bool virtio_find(struct virtio *device, unsigned type, unsigned which);
/* Reset, negotiate `wanted` & offered, check FEATURES_OK. `indirect=0`, `event_idx=0` mask those. */
void virtio_negotiate(struct virtio *device, uint64_t wanted);
void virtio_queues(struct virtio *device, unsigned wanted, unsigned size);
void virtio_ready(struct virtio *device);
void virtio_reset(struct virtio *device);
uint8_t virtio_status(const struct virtio *device);
uint64_t virtio_offered(struct virtio *device);
uint64_t virtio_config(const struct virtio *device, unsigned offset, unsigned size);
uint64_t device_irqs(const struct virtio *device);
void msix_set(struct virtio *device, unsigned entry, unsigned vector, unsigned apic_id, bool masked);
bool msix_pending(const struct virtio *device, unsigned entry);

/* ring.c */
void queue_allocate(struct queue *queue, struct virtio *device, unsigned index, unsigned size);
bool queue_add(struct queue *queue, const struct segment *segments, unsigned count, void *token);
void queue_kick(struct queue *queue);
/* The next completed token and its written length, or false. Ends the run if the device breaks the rules. */
bool queue_pop(struct queue *queue, void **token, uint32_t *length);
/* Sleep or spin until something is used; false when `deadline` (TSC) has passed. */
bool queue_wait(struct queue *queue, uint64_t deadline);
/* queue_wait with the `timeout=` of the command line (ms, default 30000); ends the run when it passes. */
void queue_await(struct queue *queue);

#endif
