/* The virtio block driver: one request structure, asynchronous and synchronous. */
#ifndef GUEST_BLK_H
#define GUEST_BLK_H
#include "virtio.h"

#define BLK_IN 0
#define BLK_OUT 1
#define BLK_FLUSH 4
#define BLK_GET_ID 8
#define BLK_DISCARD 11
#define BLK_WRITE_ZEROES 13

#define BLK_OK 0
#define BLK_IOERR 1
#define BLK_UNSUPP 2
#define BLK_NO_STATUS 0xee

#define BLK_F_RO (1ull << 5)
#define BLK_F_BLK_SIZE (1ull << 6)
#define BLK_F_FLUSH (1ull << 9)
#define BLK_F_TOPOLOGY (1ull << 10)
#define BLK_F_CONFIG_WCE (1ull << 11)
#define BLK_F_MQ (1ull << 12)
#define BLK_F_DISCARD (1ull << 13)
#define BLK_F_WRITE_ZEROES (1ull << 14)
#define BLK_F_SEG_MAX (1ull << 2)
#define BLK_F_ALL (BLK_F_RO | BLK_F_BLK_SIZE | BLK_F_FLUSH | BLK_F_TOPOLOGY | BLK_F_CONFIG_WCE | BLK_F_MQ \
                   | BLK_F_DISCARD | BLK_F_WRITE_ZEROES | BLK_F_SEG_MAX)

struct blk {
    unsigned which;                                 /* of the disks, in the order of their slots */
    struct virtio virtio;
    uint64_t sectors;
    unsigned queues;
};

struct blk_range {
    uint64_t sector;
    uint32_t sectors, flags;
};

struct blk_request {
    struct {
        uint32_t type, reserved;
        uint64_t sector;
    } header;
    volatile uint8_t status;
    uint32_t length;
    void *data;
    uint64_t begin, owner;      /* TSC at submission; whatever the owner wants to know again */
};

/* Find disk `which` (of `disk=`), negotiate, set up `queues` queues (0: all) and start it. */
void blk_open(struct blk *blk, unsigned which, unsigned queues);
bool blk_submit(struct queue *queue, struct blk_request *request);
/* One request from start to end; returns its status byte. */
uint8_t blk_do(struct blk *blk, uint32_t type, uint64_t sector, void *data, uint32_t length);
/* Fill or check a block of `size` bytes: a function of its place, version and seed. */
void pattern_fill(void *data, uint32_t size, uint64_t place, uint64_t version, uint64_t seed);

#endif
