/* A driver and a device of one split ring as two threads of one process, for ThreadSanitizer and for lost wake-ups:
   ring_race COUNT EVENT_IDX INDIRECT. Both sleep whenever the ring lets them, so a missed kick or interrupt hangs,
   which is told after ten seconds. The device is core/_native/ring.c; the driver's words are atomic here, which the
   freestanding guest's need not be. */
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ring_private.h"

#define SIZE 16
#define DESC 0x1000
#define AVAIL 0x2000
#define USED 0x3000
#define TABLES 0x4000
#define BUFFERS 0x8000
#define RAM 0x10000
#define ORDINARY 64     /* bytes of a request: its number, then room for the answer */

#define PUT(place, value) __atomic_store_n(&(place), (value), __ATOMIC_RELEASE)

static uint8_t ram[RAM] __attribute__((aligned(4096)));
static uint8_t state[CV_STATE_HEADER + sizeof(struct cv_area) + SIZE * sizeof(struct cv_head)]
    __attribute__((aligned(4096)));
static struct cv_table table;
static uint64_t count;
static unsigned event_idx, indirect;
static sem_t kicked, interrupted;
static uint64_t kicks, interrupts;

static void die(const char *what, uint64_t value)
{
    printf("ring_race: %s: %llu\n", what, (unsigned long long)value);
    fflush(stdout);
    _Exit(1);
}

static void sleep_on(sem_t *semaphore, const char *what)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 10;
    while (sem_timedwait(semaphore, &until))
        if (errno != EINTR)
            die(what, errno);
}

/* How many at once: one to `most`, so that the two do not fall into step. */
static uint32_t some(uint32_t *dice, uint32_t most)
{
    *dice = *dice * 1664525 + 1013904223;
    return 1 + (*dice >> 16) % most;
}

static uint64_t answer(uint64_t number) { return number * 0x9e3779b97f4a7c15ull ^ 0x5555; }

static void *device(void *unused)
{
    struct cv_memory memory = {.ram = ram, .ram_size = RAM, .table = &table};
    struct cv_state *shared = (struct cv_state *)state;
    struct cv_setup setup = {.desc = DESC, .avail = AVAIL, .used = USED, .epoch = 1, .size = SIZE,
                             .event_idx = (uint8_t)event_idx, .indirect = (uint8_t)indirect};
    struct cv_queue *queue = cv_queue_new(SIZE);
    struct cv_chain chains[SIZE];
    struct cv_segment segments[SIZE * 4];
    uint64_t done = 0;
    uint32_t dice = 1;

    shared->queues[0].max_size = SIZE;
    shared->queues[0].area = CV_STATE_HEADER;
    if (cv_memory_refresh(&memory) ||
        cv_queue_attach(queue, &memory, &shared->queues[0], (struct cv_area *)(state + CV_STATE_HEADER), &setup))
        die("attach", (uint64_t)queue->error);
    while (done < count) {
        int found = cv_queue_harvest(queue, chains, some(&dice, 4), segments, SIZE * 4);
        if (found < 0)
            die("harvest", (uint64_t)-found);
        for (int i = found - 1; i >= 0; i--) {  /* in another order than they came */
            struct cv_segment *first = &segments[chains[i].first];
            uint64_t number, reply;
            if (chains[i].readable != 1 || chains[i].writable != 1 || chains[i].readable_size != 8)
                die("shape of a chain", chains[i].readable_size);
            if (cv_queue_begin(queue, chains[i].head, chains[i].counter))
                die("begin", (uint64_t)queue->error);
            memcpy(&number, ram + first[0].offset, 8);
            reply = answer(number);
            memcpy(ram + first[1].offset, &reply, 8);
            if (cv_queue_complete(queue, chains[i].head, chains[i].counter, 8))
                die("complete", (uint64_t)queue->error);
        }
        int wanted = cv_queue_publish(queue);
        if (wanted < 0)
            die("publish", (uint64_t)-wanted);
        if (wanted) {
            __atomic_fetch_add(&interrupts, 1, __ATOMIC_RELAXED);
            sem_post(&interrupted);
        }
        done += (uint64_t)found;
        if (!found && !queue->more)
            sleep_on(&kicked, "no kick came");
    }
    cv_queue_free(queue);
    return unused;
}

static void offer(uint64_t number, unsigned slot)
{
    struct desc *ring = (struct desc *)(ram + DESC), *chain = ring + slot * 2;
    struct avail *avail = (struct avail *)(ram + AVAIL);
    uint64_t buffer = BUFFERS + slot * ORDINARY;
    struct desc parts[2] = {{buffer, 8, 1, (uint16_t)(slot * 2 + 1)}, {buffer + 8, 8, 2, 0}};
    uint16_t index = LOAD(avail->idx);

    memcpy(ram + buffer, &number, 8);
    memset(ram + buffer + 8, 0, 8);
    if (indirect && number % 2) {
        parts[0].next = 1;
        memcpy(ram + TABLES + slot * sizeof(parts), parts, sizeof(parts));
        chain[0] = (struct desc){TABLES + slot * sizeof(parts), sizeof(parts), 4, 0};
    } else {
        memcpy(chain, parts, sizeof(parts));
    }
    avail->ring[index % SIZE] = (uint16_t)(slot * 2);
    PUT(avail->idx, (uint16_t)(index + 1));
}

static void kick(uint16_t before)
{
    struct avail *avail = (struct avail *)(ram + AVAIL);
    struct used *used = (struct used *)(ram + USED);
    uint16_t *avail_event = (void *)&used->ring[SIZE];
    uint16_t now = LOAD(avail->idx), event;

    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    event = LOAD(*avail_event);
    if (event_idx ? (uint16_t)(now - event - 1) < (uint16_t)(now - before) : !(LOAD(used->flags) & 1)) {
        kicks++;
        sem_post(&kicked);
    }
}

static void driver(void)
{
    struct avail *avail = (struct avail *)(ram + AVAIL);
    struct used *used = (struct used *)(ram + USED);
    uint64_t offered = 0, seen = 0;
    uint64_t numbers[SIZE / 2] = {0};
    unsigned idle[SIZE / 2], idle_count = SIZE / 2;
    uint16_t next = 0;
    uint32_t dice = 2;

    for (unsigned i = 0; i < SIZE / 2; i++)
        idle[i] = i;
    while (seen < count) {
        uint16_t before = LOAD(avail->idx);
        for (uint32_t left = some(&dice, SIZE / 2); left && idle_count && offered < count; left--) {
            unsigned slot = idle[--idle_count];
            numbers[slot] = offered;
            offer(offered++, slot);
        }
        if (LOAD(avail->idx) != before)
            kick(before);
        PUT(avail->ring[SIZE], next);   /* used_event */
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (LOAD(used->idx) == next)
            sleep_on(&interrupted, "no interrupt came");
        for (; next != LOAD(used->idx); next++, seen++) {
            struct used_element element = used->ring[next % SIZE];
            unsigned slot = element.id / 2;
            uint64_t reply;
            if (element.id % 2 || slot >= SIZE / 2 || element.len != 8)
                die("used element", element.id);
            memcpy(&reply, ram + BUFFERS + slot * ORDINARY + 8, 8);
            if (reply != answer(numbers[slot]))
                die("wrong answer to request", numbers[slot]);
            idle[idle_count++] = slot;
        }
    }
}

int main(int argc, char **argv)
{
    static const struct cv_range whole = {0, RAM, 0};
    pthread_t thread;

    if (argc != 4)
        die("arguments", (uint64_t)argc);
    count = strtoull(argv[1], NULL, 0);
    event_idx = argv[2][0] == '1';
    indirect = argv[3][0] == '1';
    if (cv_table_publish(&table, &whole, 1) || sem_init(&kicked, 0, 0) || sem_init(&interrupted, 0, 0) ||
        pthread_create(&thread, NULL, device, NULL))
        die("start", (uint64_t)errno);
    driver();
    pthread_join(thread, NULL);
    printf("requests=%llu kicks=%llu interrupts=%llu\n", (unsigned long long)count, (unsigned long long)kicks,
           (unsigned long long)__atomic_load_n(&interrupts, __ATOMIC_RELAXED));
    return 0;
}
