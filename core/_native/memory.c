#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

void cv_table_publish(struct cv_table *table, const struct cv_range *ranges, uint32_t count)
{
    uint32_t version = __atomic_load_n(&table->version, __ATOMIC_RELAXED);

    __atomic_store_n(&table->version, version + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    memcpy(table->ranges, ranges, count * sizeof(*ranges));
    __atomic_store_n(&table->count, count, __ATOMIC_RELAXED);
    table->magic = CV_TABLE_MAGIC;
    __atomic_store_n(&table->version, version + 2, __ATOMIC_RELEASE);
}

static int valid(const struct cv_memory *memory)
{
    const struct cv_table *copy = &memory->copy;

    if (copy->magic != CV_TABLE_MAGIC || copy->count > CV_TABLE_RANGES)
        return 0;
    for (uint32_t i = 0; i < copy->count; i++) {
        const struct cv_range *range = &copy->ranges[i];

        if (range->size == 0 || range->gpa + range->size < range->gpa)
            return 0;
        if (range->offset > memory->ram_size || range->size > memory->ram_size - range->offset)
            return 0;
    }
    return 1;
}

int cv_memory_refresh(struct cv_memory *memory)
{
    uint32_t before = __atomic_load_n(&memory->table->version, __ATOMIC_ACQUIRE);

    if (before == memory->copy.version)
        return 0;
    for (;;) {
        if (!(before & 1)) {
            memcpy(&memory->copy, memory->table, sizeof(memory->copy));
            __atomic_thread_fence(__ATOMIC_ACQUIRE);
            if (__atomic_load_n(&memory->table->version, __ATOMIC_RELAXED) == before)
                break;
        }
        before = __atomic_load_n(&memory->table->version, __ATOMIC_ACQUIRE);
    }
    memory->copy.version = before;
    if (valid(memory))
        return 0;
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

int cv_populate(void *start, uint64_t size)
{
    return madvise(start, size, MADV_POPULATE_WRITE) ? -errno : 0;
}

int cv_punch_hole(int fd, uint64_t offset, uint64_t size)
{
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size) ? -errno : 0;
}
