/* The device that the hostile tests break: `type=blk|rng|console|net`, `dev=`, and for net `queue=` (0 receives, 1 sends,
   2 takes commands; default 1). */
#ifndef GUEST_HOSTILE_H
#define GUEST_HOSTILE_H
#include "virtio.h"

void target_find(struct virtio *device);
/* Reset it and start all that it needs; returns the queue to break. */
struct queue *target_start(struct virtio *device);
/* The flags of a valid descriptor in that queue: DESC_WRITE, or 0 if it is the driver that writes. */
uint16_t target_flags(const struct queue *queue);

#endif
