/* The driver's side of a split virtqueue (virtio 1.2, 2.7), with indirect tables and event index. */
#include "virtio.h"

void queue_allocate(struct queue *queue, struct virtio *device, unsigned index, unsigned size)
{
    bool again = queue->desc && queue->size == size;
    struct queue old = *queue;
    memset(queue, 0, sizeof *queue);
    queue->device = device;
    queue->index = (uint16_t)index;
    queue->size = (uint16_t)size;
    queue->indirect = device->features & F_INDIRECT;
    queue->event_idx = device->features & F_EVENT_IDX;
    queue->desc = again ? old.desc : allocate(16ull * size, PAGE);
    queue->avail = again ? old.avail : allocate(6 + 2ull * size, PAGE);
    queue->used = again ? old.used : allocate(6 + 8ull * size, PAGE);
    queue->tables = again ? old.tables : allocate(sizeof(struct desc) * MAX_SEGMENTS * size, PAGE);
    queue->tokens = again ? old.tokens : allocate(sizeof(void *) * size, 64);
    queue->lengths = again ? old.lengths : allocate(sizeof(uint16_t) * size, 64);
    memset((void *)queue->desc, 0, 16ull * size);
    memset((void *)queue->avail, 0, 6 + 2ull * size);
    memset((void *)queue->used, 0, 6 + 8ull * size);
    memset(queue->tokens, 0, sizeof(void *) * size);
    for (unsigned i = 0; i < size; i++)
        queue->desc[i].next = (uint16_t)(i + 1);
    queue->free_count = (uint16_t)size;
}

static volatile uint16_t *used_event(struct queue *queue) { return &queue->avail->ring[queue->size]; }
static volatile uint16_t *avail_event(struct queue *queue)
{
    return (volatile uint16_t *)&queue->used->ring[queue->size];
}

static void fill(volatile struct desc *desc, const struct segment *segment, bool more)
{
    desc->address = (uint64_t)segment->address;
    desc->length = segment->length;
    desc->flags = (uint16_t)((segment->device_writes ? DESC_WRITE : 0) | (more ? DESC_NEXT : 0));
}

bool queue_add(struct queue *queue, const struct segment *segments, unsigned count, void *token)
{
    unsigned head = queue->free_head, needed = queue->indirect ? 1 : count;
    if (queue->free_count < needed)
        return false;
    if (queue->indirect) {
        struct desc *table = queue->tables + head * MAX_SEGMENTS;
        for (unsigned i = 0; i < count; i++) {
            fill(&table[i], &segments[i], i + 1 < count);
            table[i].next = (uint16_t)(i + 1);
        }
        queue->free_head = queue->desc[head].next;
        queue->desc[head].address = (uint64_t)table;
        queue->desc[head].length = count * 16;
        queue->desc[head].flags = DESC_INDIRECT;
    } else {
        unsigned at = head;
        for (unsigned i = 0; i < count; i++) {
            fill(&queue->desc[at], &segments[i], i + 1 < count);
            at = queue->desc[at].next;
        }
        queue->free_head = (uint16_t)at;
    }
    queue->free_count = (uint16_t)(queue->free_count - needed);
    queue->tokens[head] = token;
    queue->lengths[head] = (uint16_t)needed;
    queue->avail->ring[queue->avail->index % queue->size] = (uint16_t)head;
    barrier();
    queue->avail->index++;
    return true;
}

void queue_kick(struct queue *queue)
{
    uint16_t now = queue->avail->index, then = queue->last_kick;
    fence();
    if (now == then)
        return;
    queue->last_kick = now;
    bool wanted = queue->event_idx ? (uint16_t)(now - *avail_event(queue) - 1) < (uint16_t)(now - then)
                                   : !(queue->used->flags & 1);
    if (!wanted) {
        queue->kicks_avoided++;
        return;
    }
    queue->kicks++;
    bus_write(queue->notify, 2, queue->index);
}

bool queue_pop(struct queue *queue, void **token, uint32_t *length)
{
    uint16_t pending = (uint16_t)(queue->used->index - queue->next_used);
    if (!pending)
        return false;
    require(pending <= queue->size, "queue %u: used index is %u ahead", queue->index, pending);
    barrier();
    volatile struct used_element *element = &queue->used->ring[queue->next_used % queue->size];
    uint32_t head = element->id;
    require(head < queue->size && queue->tokens[head], "queue %u: used element for head %u, which is not outstanding",
            queue->index, head);
    *token = queue->tokens[head];
    *length = element->length;
    queue->tokens[head] = NULL;
    unsigned last = head;
    for (unsigned i = 1; i < queue->lengths[head]; i++)
        last = queue->desc[last].next;
    queue->desc[last].next = queue->free_head;
    queue->free_head = (uint16_t)head;
    queue->free_count = (uint16_t)(queue->free_count + queue->lengths[head]);
    queue->next_used++;
    return true;
}

/* Ask for an interrupt at the next used element, or for none while polling. */
static void arm(struct queue *queue, bool on)
{
    if (queue->event_idx)
        *used_event(queue) = (uint16_t)(on ? queue->next_used : queue->next_used - 1);
    else
        queue->avail->flags = !on;
    fence();
}

bool queue_wait(struct queue *queue, uint64_t deadline)
{
    bool sleep = queue->device->irq != IRQ_POLL;
    bool spin = !sleep || param_is("idle", "spin");
    for (;;) {
        uint64_t seen = irq_total;
        barrier();
        if (queue->used->index != queue->next_used)
            return true;
        arm(queue, sleep);
        if (queue->used->index != queue->next_used)
            return true;
        if ((int64_t)(rdtsc() - deadline) >= 0)
            return false;
        if (spin)
            for (unsigned i = 0; i < 1000 && queue->used->index == queue->next_used; i++)
                pause();
        else
            halt(seen);
    }
}

void queue_await(struct queue *queue)
{
    static uint64_t timeout_ms;
    if (!timeout_ms)
        timeout_ms = param_number("timeout", 30000);
    if (queue_wait(queue, rdtsc() + ns_to_tsc(timeout_ms * 1000000)))
        return;
    uint8_t status = virtio_status(queue->device);
    fail("slot %u queue %u: %s after %lu ms, status 0x%x used %u avail %u", queue->device->pci->slot, queue->index,
         status & STATUS_NEEDS_RESET ? "needs-reset" : "timeout", timeout_ms, status, queue->used->index,
         queue->avail->index);
}
