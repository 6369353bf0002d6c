/* Shared by ring.c and chain.c: the rings as virtio 1.2, 2.7 lays them out. Not seen by Python. */
#ifndef CELLVISOR_RING_PRIVATE_H
#define CELLVISOR_RING_PRIVATE_H
#include "ring.h"

#define LOAD(place) __atomic_load_n(&(place), __ATOMIC_ACQUIRE)

/* A chain has more pieces than there is room for. */
#define CV_FULL (-1000000)

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

struct avail {
    uint16_t flags, idx, ring[];
};

struct used_element {
    uint32_t id, len;
};

struct used {
    uint16_t flags, idx;
    struct used_element ring[];
};

static inline int cv_queue_fail(struct cv_queue *queue, int reason, uint64_t value)
{
    queue->error = reason;
    queue->value = value;
    return -reason;
}

/* Follow the chain at `head`; at most `size` descriptors whatever the driver wrote. chain->first is set.
   0, a negative reason, or CV_FULL. */
int cv_chain_walk(struct cv_queue *queue, uint16_t head, struct cv_chain *chain, struct cv_segment *segments,
                  uint32_t room);

#endif
