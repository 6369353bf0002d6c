#include "ring_private.h"

#include <string.h>

#define DESC_NEXT 1
#define DESC_WRITE 2
#define DESC_INDIRECT 4

/* Copy one descriptor, once: the driver may rewrite it at any time. */
static int fetch(struct cv_queue *queue, const uint8_t *table, uint64_t gpa, uint32_t index, struct desc *desc)
{
    if (table) {
        memcpy(desc, table + 16 * (size_t)index, 16);
    } else {
        /* An indirect table that crosses ranges. */
        for (uint64_t done = 0; done < 16;) {
            uint64_t len = 16 - done, at = gpa + 16 * (uint64_t)index + done;
            const uint8_t *host = cv_memory_at(queue->memory, at, &len);

            if (!host)
                return cv_queue_fail(queue, CV_BAD_ADDRESS, at);
            memcpy((uint8_t *)desc + done, host, len);
            done += len;
        }
    }
    __asm__ volatile("" ::: "memory");
    return 0;
}

static int indirect_table(struct cv_queue *queue, const struct desc *desc, int nested)
{
    if (!queue->setup.indirect)
        return cv_queue_fail(queue, CV_BAD_INDIRECT_OFF, desc->addr);
    if (nested)
        return cv_queue_fail(queue, CV_BAD_INDIRECT_NESTED, desc->addr);
    if (desc->flags & DESC_NEXT)
        return cv_queue_fail(queue, CV_BAD_INDIRECT_NEXT, desc->next);
    if (desc->len == 0 || desc->len % 16 || desc->len / 16 > queue->size)
        return cv_queue_fail(queue, CV_BAD_INDIRECT_SIZE, desc->len);
    return 0;
}

/* Add one buffer to the chain, in as many pieces as it has in the memfd. */
static int add_buffer(struct cv_queue *queue, struct cv_chain *chain, const struct desc *desc,
                      struct cv_segment *segments, uint32_t room)
{
    uint64_t addr = desc->addr, left = desc->len;
    uint64_t total = (uint64_t)chain->readable_size + chain->writable_size + left;

    if (left == 0)
        return cv_queue_fail(queue, CV_BAD_EMPTY, addr);
    if (!(desc->flags & DESC_WRITE) && chain->writable)
        return cv_queue_fail(queue, CV_BAD_ORDER, addr);
    if (total > UINT32_MAX)
        return cv_queue_fail(queue, CV_BAD_TOTAL, total);
    while (left) {
        uint32_t used = chain->first + chain->readable + chain->writable;
        uint64_t len = left;
        uint8_t *host = cv_memory_at(queue->memory, addr, &len);

        if (!host)
            return cv_queue_fail(queue, CV_BAD_ADDRESS, addr);
        if (used >= room)
            return CV_FULL;
        segments[used].offset = (uint64_t)(host - queue->memory->ram);
        segments[used].len = len;
        if (desc->flags & DESC_WRITE)
            chain->writable++;
        else
            chain->readable++;
        addr += len;
        left -= len;
    }
    if (desc->flags & DESC_WRITE)
        chain->writable_size += desc->len;
    else
        chain->readable_size += desc->len;
    return 0;
}

int cv_chain_walk(struct cv_queue *queue, uint16_t head, struct cv_chain *chain, struct cv_segment *segments,
                  uint32_t room)
{
    const uint8_t *table = queue->desc;
    uint64_t gpa = 0;
    uint32_t entries = queue->size, index = head, count = 0, direct = 0;
    int nested = 0;

    *chain = (struct cv_chain){.head = head, .first = chain->first};
    for (;;) {
        struct desc desc;
        int result;

        if (index >= entries)
            return cv_queue_fail(queue, CV_BAD_NEXT, index);
        if (count++ >= queue->size)
            return cv_queue_fail(queue, CV_BAD_LONG, head);
        direct += !nested;
        if (fetch(queue, table, gpa, index, &desc))
            return -queue->error;
        if (desc.flags & DESC_INDIRECT) {
            uint64_t len = desc.len;

            if (indirect_table(queue, &desc, nested))
                return -queue->error;
            table = cv_memory_at(queue->memory, desc.addr, &len);
            if (!table)
                return cv_queue_fail(queue, CV_BAD_ADDRESS, desc.addr);
            if (len != desc.len)
                table = NULL;
            gpa = desc.addr;
            entries = desc.len / 16;
            index = 0;
            nested = 1;
            count--;  /* the reference is no buffer */
            continue;
        }
        result = add_buffer(queue, chain, &desc, segments, room);
        if (result)
            return result;
        if (!(desc.flags & DESC_NEXT))
            break;
        index = desc.next;
    }
    /* Chains that share descriptors would make the work of one harvest quadratic. */
    if (queue->direct + direct - queue->spans[head] > queue->size)
        return cv_queue_fail(queue, CV_BAD_SHARED, head);
    queue->direct += direct - queue->spans[head];
    queue->spans[head] = direct;
    return 0;
}
