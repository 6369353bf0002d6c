#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>

/* A writer holds the lock for less than a microsecond; after this many yields it is dead, not slow. */
#define PATIENCE 10000

_Static_assert(sizeof(struct cv_table) == 16 + CV_TABLE_RANGES * 24, "table layout");

int cv_table_publish(struct cv_table *table, const struct cv_range *ranges, uint32_t count)
{
    uint32_t version = __atomic_load_n(&table->version, __ATOMIC_RELAXED);

    if (count > CV_TABLE_RANGES)
        return -EINVAL;
    __atomic_store_n(&table->version, version + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    memcpy(table->ranges, ranges, count * sizeof(*ranges));
    table->count = count;
    table->magic = CV_TABLE_MAGIC;
    __atomic_store_n(&table->version, version + 2, __ATOMIC_RELEASE);
    return 0;
}

static int valid(const struct cv_table *copy, uint64_t ram_size)
{
    if (copy->magic != CV_TABLE_MAGIC || copy->count > CV_TABLE_RANGES)
        return 0;
    for (uint32_t i = 0; i < copy->count; i++) {
        const struct cv_range *range = &copy->ranges[i];

        if (range->size == 0 || range->gpa + range->size < range->gpa)
            return 0;
        if (range->offset > ram_size || range->size > ram_size - range->offset)
            return 0;
    }
    return 1;
}

int cv_memory_refresh(struct cv_memory *memory)
{
    struct cv_table copy;
    uint32_t before = __atomic_load_n(&memory->table->version, __ATOMIC_ACQUIRE);

    if (before == memory->copy.version)
        return 0;
    for (int tries = 0;; tries++) {
        if (!(before & 1)) {
            memcpy(&copy, memory->table, sizeof(copy));
            __atomic_thread_fence(__ATOMIC_ACQUIRE);
            if (__atomic_load_n(&memory->table->version, __ATOMIC_RELAXED) == before)
                break;
        }
        if (tries == PATIENCE)
            return -EAGAIN;
        sched_yield();
        before = __atomic_load_n(&memory->table->version, __ATOMIC_ACQUIRE);
    }
    copy.version = before;
    if (valid(&copy, memory->ram_size)) {
        memory->copy = copy;
        return 0;
    }
    memory->copy.version = before;
    memory->copy.count = 0;
    return -EINVAL;
}

uint8_t *cv_memory_at(const struct cv_memory *memory, uint64_t gpa, uint64_t *len)
{
    for (uint32_t i = 0; i < memory->copy.count; i++) {
        const struct cv_range *range = &memory->copy.ranges[i];
        uint64_t into = gpa - range->gpa;

        if (gpa < range->gpa || into >= range->size)
            continue;
        if (*len > range->size - into)
            *len = range->size - into;
        return memory->ram + range->offset + into;
    }
    return NULL;
}

int cv_memfd_seal(int fd, int readonly)
{
    int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL | (readonly ? F_SEAL_FUTURE_WRITE : 0);

    return fcntl(fd, F_ADD_SEALS, seals) ? -errno : 0;
}

int cv_populate(void *start, uint64_t size)
{
    return madvise(start, size, MADV_POPULATE_WRITE) ? -errno : 0;
}
