/* Split virtqueues (virtio 1.2, 2.7) from the device's side, with a state memfd that outlives the process.

   head:  FREE -> FETCHED -> EXECUTED -> PUBLISHING -> FREE      an ordinary request
                  FETCHED -> SENDING -> EXECUTED                 must not run twice: counts as done
                  FETCHED -> TOGETHER -> FREE                    several heads under one commit

   Each store of data precedes, with release order, the store of the state that vouches for it. */
#ifndef CELLVISOR_RING_H
#define CELLVISOR_RING_H
#include "memory.h"

#define CV_STATE_MAGIC 0x31535643
#define CV_STATE_VERSION 1
#define CV_STATE_QUEUES 64
#define CV_STATE_HEADER 4096

#define CV_FREE 0
#define CV_FETCHED 1
#define CV_SENDING 2
#define CV_EXECUTED 3
#define CV_PUBLISHING 4
#define CV_TOGETHER 5

/* What a negative return means, and what cv_queue.value then holds. */
#define CV_BAD_JUMP 1
#define CV_BAD_HEAD 2
#define CV_BAD_BUSY 3
#define CV_BAD_NEXT 4
#define CV_BAD_LONG 5
#define CV_BAD_ADDRESS 6
#define CV_BAD_EMPTY 7
#define CV_BAD_ORDER 8
#define CV_BAD_TOTAL 9
#define CV_BAD_INDIRECT_OFF 10
#define CV_BAD_INDIRECT_NESTED 11
#define CV_BAD_INDIRECT_NEXT 12
#define CV_BAD_INDIRECT_SIZE 13
#define CV_BAD_SHARED 14
#define CV_BAD_PIECES 15
#define CV_BAD_SIZE 16
#define CV_BAD_ALIGNMENT 17
#define CV_BAD_DESC_RING 18
#define CV_BAD_AVAIL_RING 19
#define CV_BAD_USED_RING 20
#define CV_BAD_TABLE 21
#define CV_BAD_STATE_CONFIG 22
#define CV_BAD_STATE_VALUE 23
#define CV_BAD_STATE_POS 24
#define CV_BAD_STATE_COUNTER 25
#define CV_BAD_CHAIN 26
#define CV_BAD_SENDING 27

/* The state memfd: one cv_state in its first page, then a cv_area per queue, then the private area twice. */
struct cv_entry {
    uint64_t desc, avail, used;
    uint32_t epoch;     /* the activation that the area belongs to; 0: none. Stored last. */
    uint16_t size;
    uint16_t max_size;  /* this and `area` are core's, fixed when the memfd is made */
    uint32_t area;
    uint32_t reserved;
};

struct cv_state {
    uint32_t magic, version;
    uint32_t generation, epoch;
    uint64_t features;
    uint32_t size, queue_count;
    uint32_t private_offset, private_size;
    uint64_t private_current;   /* version << 32 | length << 1 | which copy */
    uint64_t ping, echo;        /* core counts ping up, the worker's loop copies it to echo */
    uint64_t in_syscall_since;  /* CLOCK_MONOTONIC in ns, 0: not blocked */
    uint64_t reserved[7];
    struct cv_entry queues[64];
};

struct cv_head {
    uint8_t state;
    uint8_t starts;     /* how often execution began without an end */
    uint16_t pos;       /* index in the used ring, valid from PUBLISHING on */
    uint32_t used_len;
    uint64_t counter;   /* order of fetching */
};

struct cv_area {
    uint16_t used_next;
    uint16_t reserved[7];
    struct cv_head heads[];
};

/* One descriptor chain: `readable` segments from `first`, then `writable` ones. */
struct cv_chain {
    uint16_t head;
    uint8_t starts;
    uint8_t reserved;
    uint32_t used_len;
    uint64_t counter;
    uint32_t first, readable, writable;
    uint32_t readable_size, writable_size;
    uint32_t reserved2;
};

/* Host memory of a piece of a chain: `offset` in the guest RAM memfd. */
struct cv_segment {
    uint64_t offset;
    uint64_t len;
};

struct cv_setup {
    uint64_t desc, avail, used;
    uint32_t epoch;
    uint16_t size;
    uint8_t event_idx, indirect;
};

/* One process's handle of a queue. */
struct cv_queue {
    struct cv_memory *memory;
    struct cv_entry *entry;
    struct cv_area *area;
    struct cv_setup setup;
    uint8_t *desc, *avail, *used;
    uint64_t counter;
    uint64_t value;
    uint32_t table_version;
    uint32_t pending_count;
    uint32_t direct;
    int error;
    uint16_t last_avail, used_next;
    uint16_t size;
    uint8_t more, sending;
    uint16_t *pending;
    uint16_t *spans;
};

struct cv_queue *cv_queue_new(uint16_t size);
void cv_queue_free(struct cv_queue *queue);

/* Bind to rings and state. 0: a fresh activation; 1: the area holds a predecessor's requests of the same
   epoch, cv_queue_recover must follow. */
int cv_queue_attach(struct cv_queue *queue, struct cv_memory *memory, struct cv_entry *entry,
                    struct cv_area *area, const struct cv_setup *setup);

/* Settle what a predecessor left. Returns how many heads must run again, in `heads` (size of the queue)
   in the order in which they were fetched. An interrupt is due afterwards, always. */
int cv_queue_recover(struct cv_queue *queue, uint16_t *heads);

/* Say that the driver reset the device: nothing in the area counts any more. */
int cv_queue_forget(struct cv_queue *queue);

/* Fetch up to `limit` chains into `chains` and `segments`. Unless cv_queue.more is set afterwards the ring
   was empty and the next buffer will be kicked for. */
int cv_queue_harvest(struct cv_queue *queue, struct cv_chain *chains, uint32_t limit,
                     struct cv_segment *segments, uint32_t room);

/* Walk the chain of one FETCHED head again. */
int cv_queue_walk(struct cv_queue *queue, uint16_t head, struct cv_chain *chain, struct cv_segment *segments,
                  uint32_t room);

/* A request begins to execute; it made `used_len` bytes of progress; its effect may have left from now on. */
int cv_queue_begin(struct cv_queue *queue, uint16_t head, uint64_t counter);
int cv_queue_progress(struct cv_queue *queue, uint16_t head, uint64_t counter, uint32_t used_len);
int cv_queue_sending(struct cv_queue *queue, uint16_t head, uint64_t counter);

/* Forget how often it began: the worker's death was not its doing. */
int cv_queue_absolve(struct cv_queue *queue, uint16_t head, uint64_t counter);

/* write(2) what begins at byte `done` of the request. It is noted first and corrected if it was less: a signal
   that kills finds the process in the system call, which ends before the process does. Returns what write()
   did, -errno, or CV_WRITE_REFUSED if the chain is none that is being executed. */
#define CV_WRITE_REFUSED -1000000
int64_t cv_queue_write(struct cv_queue *queue, uint16_t head, uint64_t counter, uint32_t done, int fd,
                       const uint8_t *data, uint32_t size);

/* The request is done; the next publish tells the driver. */
int cv_queue_complete(struct cv_queue *queue, uint16_t head, uint64_t counter, uint32_t used_len);

/* Publish what is complete, or `count` FETCHED heads together. 1: interrupt the driver. */
int cv_queue_publish(struct cv_queue *queue);
int cv_queue_publish_together(struct cv_queue *queue, const uint16_t *heads, const uint64_t *counters,
                              const uint32_t *lengths, uint32_t count);

/* Words of the state memfd that both sides watch. */
void cv_word_store(uint64_t *word, uint64_t value);
uint64_t cv_word_load(const uint64_t *word);
#endif
