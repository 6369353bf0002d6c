#include "ring_private.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The crash tests build this file with -DCV_FAULTS and their own two macros, which end the call before its
   k-th store. Every store to shared memory goes through STORE. */
#ifndef CV_FAULTS
#define CV_ENTER() ((void)0)
#define CV_POINT() ((void)0)
#endif
#define STORE(place, value)                                            \
    do {                                                               \
        CV_POINT();                                                    \
        __atomic_store_n(&(place), (value), __ATOMIC_RELEASE);         \
    } while (0)

#define AVAIL_NO_INTERRUPT 1
/* Far above what fetching can reach, far below where adding one would wrap. */
#define COUNTER_LIMIT (1ULL << 63)

_Static_assert(sizeof(struct desc) == 16 && sizeof(struct used_element) == 8, "virtio 1.2, 2.7.5 and 2.7.8");
_Static_assert(sizeof(struct cv_head) == 16 && sizeof(struct cv_area) == 16, "state layout");
_Static_assert(sizeof(struct cv_entry) == 40 && offsetof(struct cv_state, queues) == 128, "state layout");
_Static_assert(sizeof(struct cv_state) <= CV_STATE_HEADER, "state header fits its page");
_Static_assert(sizeof(struct cv_chain) == 40 && sizeof(struct cv_segment) == 16, "what Python unpacks");

static uint16_t *avail_event(struct cv_queue *queue)
{
    return (uint16_t *)(queue->used + 4 + 8 * (size_t)queue->size);
}

static uint16_t *used_event(struct cv_queue *queue)
{
    return (uint16_t *)(queue->avail + 4 + 2 * (size_t)queue->size);
}

static uint8_t *ring_at(struct cv_queue *queue, uint64_t gpa, uint64_t size)
{
    uint64_t len = size;
    uint8_t *host = cv_memory_at(queue->memory, gpa, &len);

    return len == size ? host : NULL;
}

/* Translate the rings, at activation and whenever the range table has moved on. */
static int map_rings(struct cv_queue *queue)
{
    const struct cv_setup *setup = &queue->setup;
    uint64_t size = setup->size;

    if (cv_memory_refresh(queue->memory))
        return cv_queue_fail(queue, CV_BAD_TABLE, queue->memory->copy.version);
    if (queue->used && queue->table_version == queue->memory->copy.version)
        return 0;
    queue->desc = ring_at(queue, setup->desc, 16 * size);
    queue->avail = ring_at(queue, setup->avail, 6 + 2 * size);
    queue->used = ring_at(queue, setup->used, 6 + 8 * size);
    if (!queue->desc)
        return cv_queue_fail(queue, CV_BAD_DESC_RING, setup->desc);
    if (!queue->avail)
        return cv_queue_fail(queue, CV_BAD_AVAIL_RING, setup->avail);
    if (!queue->used)
        return cv_queue_fail(queue, CV_BAD_USED_RING, setup->used);
    queue->table_version = queue->memory->copy.version;
    return 0;
}

struct cv_queue *cv_queue_new(uint16_t size)
{
    struct cv_queue *queue = calloc(1, sizeof(*queue) + 2 * sizeof(uint16_t) * (size_t)size);

    if (queue) {
        queue->size = size;
        queue->pending = (uint16_t *)(queue + 1);
        queue->spans = queue->pending + size;
    }
    return queue;
}

void cv_queue_free(struct cv_queue *queue)
{
    free(queue);
}

static uint64_t first_counter(const struct cv_queue *queue)
{
    return (uint64_t)(queue->setup.epoch & 0x3fffff) << 40;
}

int cv_queue_attach(struct cv_queue *queue, struct cv_memory *memory, struct cv_entry *entry,
                    struct cv_area *area, const struct cv_setup *setup)
{
    uint16_t size = setup->size;

    CV_ENTER();
    queue->memory = memory;
    queue->entry = entry;
    queue->area = area;
    queue->setup = *setup;
    if (size == 0 || size != queue->size || size & (size - 1) || size > entry->max_size)
        return cv_queue_fail(queue, CV_BAD_SIZE, size);
    if (setup->desc % 16 || setup->avail % 2 || setup->used % 4)
        return cv_queue_fail(queue, CV_BAD_ALIGNMENT, setup->desc % 16 ? setup->desc
                                             : setup->avail % 2 ? setup->avail : setup->used);
    if (map_rings(queue))
        return -queue->error;
    if (setup->epoch && LOAD(entry->epoch) == setup->epoch) {
        if (entry->desc != setup->desc || entry->avail != setup->avail || entry->used != setup->used ||
            entry->size != size)
            return cv_queue_fail(queue, CV_BAD_STATE_CONFIG, entry->size);
        queue->used_next = LOAD(area->used_next);
        return 1;
    }
    STORE(entry->epoch, 0);
    STORE(area->used_next, 0);
    for (uint32_t i = 0; i < size; i++)
        STORE(area->heads[i].state, CV_FREE);
    STORE(entry->desc, setup->desc);
    STORE(entry->avail, setup->avail);
    STORE(entry->used, setup->used);
    STORE(entry->size, size);
    STORE(entry->epoch, setup->epoch);
    /* Chains of an earlier activation must not pass for chains of this one. */
    queue->counter = first_counter(queue);
    return 0;
}

int cv_queue_forget(struct cv_queue *queue)
{
    CV_ENTER();
    STORE(queue->entry->epoch, 0);
    return 0;
}

static int wants_interrupt(struct cv_queue *queue, uint16_t old, uint16_t new)
{
    /* used.idx must be visible before the driver's wish is read, or both sides sleep. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!queue->setup.event_idx)
        return !(LOAD(((struct avail *)queue->avail)->flags) & AVAIL_NO_INTERRUPT);
    return (uint16_t)(new - LOAD(*used_event(queue)) - 1) < (uint16_t)(new - old);
}

static void write_element(struct cv_queue *queue, uint16_t head)
{
    struct cv_head *entry = &queue->area->heads[head];
    struct used_element *element = &((struct used *)queue->used)->ring[entry->pos & (queue->size - 1)];

    STORE(element->id, head);
    STORE(element->len, entry->used_len);
}

/* The publishing order. A crash before (2) undoes the batch, a crash after it is completed by recovery. */
static int commit(struct cv_queue *queue, const uint16_t *list, uint32_t count, uint8_t mark)
{
    struct cv_head *heads = queue->area->heads;
    uint16_t old = queue->used_next, new = old + count;

    for (uint32_t i = 0; i < count; i++) {  /* (1) */
        STORE(heads[list[i]].pos, (uint16_t)(old + i));
        STORE(heads[list[i]].state, mark);
    }
    STORE(queue->area->used_next, new);     /* (2) */
    queue->used_next = new;
    for (uint32_t i = 0; i < count; i++)    /* (3) */
        write_element(queue, list[i]);
    STORE(((struct used *)queue->used)->idx, new);  /* (4) */
    for (uint32_t i = 0; i < count; i++) {  /* (5) */
        STORE(heads[list[i]].state, CV_FREE);
        queue->direct -= queue->spans[list[i]];
        queue->spans[list[i]] = 0;
    }
    return wants_interrupt(queue, old, new);  /* (6) */
}

struct order {
    uint64_t counter;
    uint16_t head;
};

static int by_counter(const void *left, const void *right)
{
    const struct order *a = left, *b = right;

    if (a->counter != b->counter)
        return a->counter < b->counter ? -1 : 1;
    return (int)a->head - (int)b->head;
}

/* Nothing that the predecessor left is believed before this has passed; nothing is stored before, either. */
static int check_area(struct cv_queue *queue, uint8_t *taken)
{
    for (uint32_t i = 0; i < queue->size; i++) {
        const struct cv_head *head = &queue->area->heads[i];
        uint16_t ahead = head->pos - queue->used_next, behind = queue->used_next - 1 - head->pos;
        uint16_t slot = head->pos & (queue->size - 1);

        if (head->state > CV_TOGETHER)
            return cv_queue_fail(queue, CV_BAD_STATE_VALUE, head->state);
        if (head->state != CV_FREE && head->counter >= COUNTER_LIMIT)
            return cv_queue_fail(queue, CV_BAD_STATE_COUNTER, head->counter);
        if (head->state < CV_PUBLISHING)
            continue;
        if ((ahead >= queue->size && behind >= queue->size) || (behind < queue->size && taken[slot]))
            return cv_queue_fail(queue, CV_BAD_STATE_POS, head->pos);
        if (behind < queue->size)
            taken[slot] = 1;
    }
    return 0;
}

static int committed(const struct cv_queue *queue, const struct cv_head *head)
{
    return head->state >= CV_PUBLISHING && (uint16_t)(queue->used_next - 1 - head->pos) < queue->size;
}

/* Bring every head to FREE, FETCHED or EXECUTED. May be killed and repeated at any point. */
static void settle(struct cv_queue *queue)
{
    struct cv_head *heads = queue->area->heads;

    for (uint32_t i = 0; i < queue->size; i++)
        if (committed(queue, &heads[i]))
            write_element(queue, i);
    STORE(((struct used *)queue->used)->idx, queue->used_next);
    for (uint32_t i = 0; i < queue->size; i++) {
        if (committed(queue, &heads[i])) {
            STORE(heads[i].state, CV_FREE);
        } else if (heads[i].state == CV_PUBLISHING) {
            STORE(heads[i].state, CV_EXECUTED);
        } else if (heads[i].state == CV_TOGETHER) {
            STORE(heads[i].used_len, 0);
            STORE(heads[i].state, CV_FETCHED);
        } else if (heads[i].state == CV_SENDING) {
            STORE(heads[i].state, CV_EXECUTED);
        }
    }
}

int cv_queue_recover(struct cv_queue *queue, uint16_t *list)
{
    struct cv_head *heads = queue->area->heads;
    struct order orders[queue->size];
    uint8_t taken[queue->size];
    uint32_t count = 0, again = 0;

    CV_ENTER();
    memset(taken, 0, sizeof(taken));
    if (check_area(queue, taken))
        return -queue->error;
    settle(queue);
    queue->pending_count = 0;
    for (uint32_t i = 0; i < queue->size; i++)
        if (heads[i].state != CV_FREE)
            orders[count++] = (struct order){heads[i].counter, i};
    qsort(orders, count, sizeof(orders[0]), by_counter);
    for (uint32_t i = 0; i < count; i++) {
        if (heads[orders[i].head].state == CV_EXECUTED)
            queue->pending[queue->pending_count++] = orders[i].head;
        else
            list[again++] = orders[i].head;
    }
    queue->last_avail = queue->used_next + count;
    queue->counter = count ? orders[count - 1].counter + 1 : first_counter(queue);
    /* No number twice in one activation: a device may have kept what it knows of a request under its number. */
    for (uint32_t i = 0; i < queue->size; i++)
        if (heads[i].counter >= queue->counter && heads[i].counter >> 40 == first_counter(queue) >> 40)
            queue->counter = heads[i].counter + 1;
    if (queue->pending_count)
        commit(queue, queue->pending, queue->pending_count, CV_PUBLISHING);
    queue->pending_count = 0;
    return (int)again;
}

int cv_queue_walk(struct cv_queue *queue, uint16_t head, struct cv_chain *chain, struct cv_segment *segments,
                  uint32_t room)
{
    struct cv_head *entry = &queue->area->heads[head];
    int result;

    if (map_rings(queue))
        return -queue->error;
    if (head >= queue->size || entry->state != CV_FETCHED)
        return -CV_BAD_CHAIN;
    chain->first = 0;
    result = cv_chain_walk(queue, head, chain, segments, room);
    if (result)
        return result == CV_FULL ? cv_queue_fail(queue, CV_BAD_PIECES, head) : result;
    chain->counter = entry->counter;
    chain->used_len = entry->used_len;
    chain->starts = entry->starts;
    return 0;
}

int cv_queue_harvest(struct cv_queue *queue, struct cv_chain *chains, uint32_t limit,
                     struct cv_segment *segments, uint32_t room)
{
    struct avail *avail;
    uint32_t count = 0, used = 0;
    int armed = 0;

    CV_ENTER();
    if (queue->error || map_rings(queue))
        return -queue->error;
    avail = (struct avail *)queue->avail;
    queue->more = 0;
    for (;;) {
        uint16_t ready = LOAD(avail->idx) - queue->last_avail;

        if (ready > queue->size)
            return cv_queue_fail(queue, CV_BAD_JUMP, ready);
        if (!ready) {
            if (armed)
                return (int)count;
            /* Ask to be kicked for the next one, then look again: it may have come meanwhile. */
            if (queue->setup.event_idx)
                STORE(*avail_event(queue), queue->last_avail);
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            armed = 1;
            continue;
        }
        for (armed = 0; ready; ready--) {
            uint16_t head = LOAD(avail->ring[queue->last_avail & (queue->size - 1)]);
            struct cv_head *entry;
            int result;

            if (count == limit) {
                queue->more = 1;
                return (int)count;
            }
            if (head >= queue->size)
                return cv_queue_fail(queue, CV_BAD_HEAD, head);
            entry = &queue->area->heads[head];
            if (entry->state != CV_FREE)
                return cv_queue_fail(queue, CV_BAD_BUSY, head);
            chains[count].first = used;
            result = cv_chain_walk(queue, head, &chains[count], segments, room);
            if (result == CV_FULL && count) {
                queue->more = 1;
                return (int)count;
            }
            if (result)
                return result == CV_FULL ? cv_queue_fail(queue, CV_BAD_PIECES, head) : result;
            used += chains[count].readable + chains[count].writable;
            chains[count].counter = queue->counter;
            STORE(entry->counter, queue->counter);
            STORE(entry->used_len, 0);
            STORE(entry->starts, 0);
            STORE(entry->state, CV_FETCHED);
            queue->counter++;
            queue->last_avail++;
            count++;
        }
    }
}

/* The head of a chain that this activation fetched and has not completed, or NULL. */
static struct cv_head *fetched(struct cv_queue *queue, uint16_t head, uint64_t counter)
{
    struct cv_head *entry = &queue->area->heads[head];

    if (head >= queue->size || entry->counter != counter)
        return NULL;
    return entry->state == CV_FETCHED || entry->state == CV_SENDING ? entry : NULL;
}

int cv_queue_begin(struct cv_queue *queue, uint16_t head, uint64_t counter)
{
    struct cv_head *entry = fetched(queue, head, counter);

    CV_ENTER();
    if (!entry)
        return -CV_BAD_CHAIN;
    if (entry->starts < UINT8_MAX)
        STORE(entry->starts, (uint8_t)(entry->starts + 1));
    return 0;
}

int cv_queue_progress(struct cv_queue *queue, uint16_t head, uint64_t counter, uint32_t used_len)
{
    struct cv_head *entry = fetched(queue, head, counter);

    CV_ENTER();
    if (!entry)
        return -CV_BAD_CHAIN;
    STORE(entry->used_len, used_len);
    return 0;
}

int cv_queue_absolve(struct cv_queue *queue, uint16_t head, uint64_t counter)
{
    struct cv_head *entry = fetched(queue, head, counter);

    CV_ENTER();
    if (!entry)
        return -CV_BAD_CHAIN;
    STORE(entry->starts, 0);
    return 0;
}

int64_t cv_queue_write(struct cv_queue *queue, uint16_t head, uint64_t counter, uint32_t done, int fd,
                       const uint8_t *data, uint32_t size)
{
    struct cv_head *entry = fetched(queue, head, counter);
    ssize_t count;
    int error;

    CV_ENTER();
    if (!entry)
        return CV_WRITE_REFUSED;
    STORE(entry->used_len, done + size);
    do
        count = write(fd, data, size);
    while (count < 0 && errno == EINTR);
    error = errno;
    if (count != (ssize_t)size)
        STORE(entry->used_len, done + (count > 0 ? (uint32_t)count : 0));
    return count < 0 ? -(int64_t)error : count;
}

int cv_queue_sending(struct cv_queue *queue, uint16_t head, uint64_t counter)
{
    struct cv_head *entry = fetched(queue, head, counter);

    CV_ENTER();
    if (!entry || entry->state != CV_FETCHED)
        return -CV_BAD_CHAIN;
    if (queue->sending)
        return -CV_BAD_SENDING;
    STORE(entry->used_len, 0);
    STORE(entry->state, CV_SENDING);
    queue->sending = 1;
    return 0;
}

int cv_queue_complete(struct cv_queue *queue, uint16_t head, uint64_t counter, uint32_t used_len)
{
    struct cv_head *entry = fetched(queue, head, counter);

    CV_ENTER();
    if (!entry)
        return -CV_BAD_CHAIN;
    if (entry->state == CV_SENDING)
        queue->sending = 0;
    STORE(entry->used_len, used_len);
    STORE(entry->state, CV_EXECUTED);
    STORE(entry->starts, 0);
    queue->pending[queue->pending_count++] = head;
    return 0;
}

int cv_queue_publish(struct cv_queue *queue)
{
    uint32_t count = queue->pending_count;

    CV_ENTER();
    if (!count)
        return 0;
    if (map_rings(queue))
        return -queue->error;
    queue->pending_count = 0;
    return commit(queue, queue->pending, count, CV_PUBLISHING);
}

int cv_queue_publish_together(struct cv_queue *queue, const uint16_t *list, const uint64_t *counters,
                              const uint32_t *lengths, uint32_t count)
{
    CV_ENTER();
    if (!count)
        return 0;
    if (map_rings(queue))
        return -queue->error;
    for (uint32_t i = 0; i < count; i++) {
        struct cv_head *entry = fetched(queue, list[i], counters[i]);

        if (!entry || entry->state != CV_FETCHED)
            return -CV_BAD_CHAIN;
        for (uint32_t k = 0; k < i; k++)
            if (list[k] == list[i])
                return -CV_BAD_CHAIN;
    }
    for (uint32_t i = 0; i < count; i++)
        STORE(queue->area->heads[list[i]].used_len, lengths[i]);
    return commit(queue, list, count, CV_TOGETHER);
}

void cv_word_store(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

uint64_t cv_word_load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
