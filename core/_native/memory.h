/* Which guest-physical addresses are RAM: a versioned table in shared memory, and the only translation. */
#ifndef CELLVISOR_MEMORY_H
#define CELLVISOR_MEMORY_H
#include <stddef.h>
#include <stdint.h>

#define CV_TABLE_MAGIC 0x31425443
#define CV_TABLE_RANGES 64

/* One stretch of RAM: gpa .. gpa+size lies at `offset` of the guest RAM memfd. */
struct cv_range {
    uint64_t gpa;
    uint64_t size;
    uint64_t offset;
};

/* Written by core alone (workers hold it read-only). Sequence lock: odd while being written. */
struct cv_table {
    uint32_t magic;
    uint32_t version;
    uint32_t count;
    uint32_t reserved;
    struct cv_range ranges[64];
};

/* One process's view: the mapped memfd, the mapped table and a private, checked copy of the table. */
struct cv_memory {
    uint8_t *ram;
    uint64_t ram_size;
    const struct cv_table *table;
    struct cv_table copy;
};

/* Publish `count` ranges; core only. 0, or -EINVAL for too many. */
int cv_table_publish(struct cv_table *table, const struct cv_range *ranges, uint32_t count);

/* Fill the private copy if the table moved on. 0; -EINVAL if the table makes no sense (the copy is then
   empty); -EAGAIN if its writer does not finish (the copy stays). */
int cv_memory_refresh(struct cv_memory *memory);

/* Translate gpa to a host pointer. *len shrinks to what is contiguous here. NULL if gpa is not RAM. */
uint8_t *cv_memory_at(const struct cv_memory *memory, uint64_t gpa, uint64_t *len);

/* Seal a memfd against resizing; `readonly` also refuses new writable mappings. 0 or -errno. */
int cv_memfd_seal(int fd, int readonly);

/* Touch every page of `size` bytes now (MADV_POPULATE_WRITE, Linux 5.14). 0 or -errno. */
int cv_populate(void *start, uint64_t size);

#endif
