/* Two CPUs against one device: one submits requests, the other rewrites everything that the device reads meanwhile. And
   floods: more of the same than anybody should keep. */
#include "blk.h"
#include "hostile.h"
#include "tests.h"

#define PIECE 4096
#define HOLE (1ull << 45)

static struct virtio virtio;
static struct queue *queue;
static uint8_t *data;
static struct blk_request *request;
static volatile bool stopped, hold, held;
static uint64_t flips;

static void start(void) { queue = target_start(&virtio); }

/* A descriptor that is sometimes good. Nothing that a device may write through it is code, stack or rings. */
static void spoil(volatile struct desc *desc, uint64_t random)
{
    const uint64_t addresses[] = {(uint64_t)data, (uint64_t)data + PIECE, HOLE, virtio.common & ~0xfffull, acpi.lapic,
                                  0ull - 16, (uint64_t)&request->header, acpi.ecam};
    static const uint32_t lengths[] = {0, 1, 15, 16, 17, 512, PIECE, 0xffffffff};
    switch (random & 3) {
    case 0: desc->address = addresses[random >> 8 & 7]; break;
    case 1: desc->length = lengths[random >> 8 & 7]; break;
    case 2: desc->flags = (uint16_t)(random >> 8 & 7); break;
    case 3: desc->next = (uint16_t)(random >> 8 & (random >> 32 & 1 ? 0xffff : 3)); break;
    }
}

/* The second CPU: descriptors, tables, the available ring, the request's header; with `registers=1` the live queue's
   registers and the doorbell too. */
static void flip(void *unused)
{
    (void)unused;
    uint64_t state = param_number("seed", 1), registers = param_number("registers", 0);
    while (!stopped) {
        uint64_t random = random_next(&state);
        held = hold;
        if (held)
            continue;
        for (unsigned i = 0; i < 3; i++)
            spoil((random & 16 ? queue->tables : (struct desc *)queue->desc) + i, random_next(&state));
        if (!(random & 0xfff00))
            queue->avail->ring[queue->avail->index % queue->size] = (uint16_t)(random >> 16 & 3);
        if (!(random & 0xffff000))
            queue->avail->index = (uint16_t)(queue->avail->index + (random >> 20 & 1 ? 0x8000 : 1));
        request->header.type = (uint32_t)(random >> 24 & 15);
        request->header.sector = random >> 28 & 1 ? random : random >> 50;
        if (virtio.type == VIRTIO_NET)
            *(volatile uint64_t *)&request->header = random >> 3;
        if (registers && !(random & 0x3f)) {
            bus_write(virtio.common + C_QUEUE_SELECT, 2, random >> 40 & 3);
            bus_write(virtio.common + C_QUEUE_SIZE + (random >> 44 & 30), 2, random >> 32 & 0xffff);
            bus_write(queue->notify, 2, random >> 48);
        }
        flips++;
    }
}

/* Set the device up again; meanwhile the second CPU waits. */
static void again(void)
{
    hold = true;
    while (!held)
        pause();
    start();
    hold = false;
    while (held)
        pause();
}

static void offer(bool indirect)
{
    struct desc *chain = indirect ? queue->tables : (struct desc *)queue->desc;
    uint16_t flags = target_flags(queue);
    request->header.type = BLK_IN;
    request->header.sector = 0;
    chain[0] = (struct desc){(uint64_t)data + PIECE, 16, flags | DESC_NEXT, 1};
    if (virtio.type == VIRTIO_BLK || (virtio.type == VIRTIO_NET && !flags))
        chain[0] = (struct desc){(uint64_t)&request->header, 16, DESC_NEXT, 1};
    chain[1] = (struct desc){(uint64_t)data, PIECE, flags | DESC_NEXT, 2};
    chain[2] = (struct desc){(uint64_t)data + 2 * PIECE, 1, flags, 0};
    if (virtio.type == VIRTIO_NET && queue->index == 2)
        chain[2].flags = DESC_WRITE;
    if (indirect) {
        queue->desc[0].address = (uint64_t)chain;
        queue->desc[0].length = 48;
        queue->desc[0].flags = DESC_INDIRECT;
    }
    queue->avail->ring[queue->avail->index % queue->size] = 0;
    fence();
    queue->avail->index++;
    fence();
    bus_write(queue->notify, 2, queue->index);
}

static void open(void)
{
    target_find(&virtio);
    request = allocate(sizeof *request, 64);
    data = allocate(4 * PIECE, PAGE);
    start();
}

/* test=race: the target of hostile.h for `ms=`(2000); needs a second CPU. Ends with a reset. */
void test_race(void)
{
    uint64_t rounds = 0, broken = 0, used = 0;
    require(smp_start() > 1, "test=race needs two CPUs");
    open();
    smp_run(1, flip, NULL);
    for (uint64_t end = now_ns() + param_number("ms", 2000) * 1000000; now_ns() < end; rounds++) {
        uint16_t before = queue->used->index;
        offer(queue->indirect && rounds & 1);
        bool bad = false;
        for (unsigned i = 0; i < 20 && queue->used->index == before && !bad; i++) {
            delay_us(100);
            bad = virtio_status(&virtio) & STATUS_NEEDS_RESET;
        }
        used += queue->used->index != before;
        if (bad || virtio_status(&virtio) & STATUS_NEEDS_RESET) {
            broken++;
            again();
        } else if (rounds % 64 == 63) {
            again();                    /* the other CPU may have made the ring useless without anybody noticing */
        }
    }
    stopped = true;
    require(smp_wait(1, 10000), "the second CPU does not stop");
    virtio_reset(&virtio);
    print("race.rounds=%lu\nrace.needs_reset=%lu\nrace.used=%lu\nrace.flips=%lu\n", rounds, broken, used, flips);
    stopped = false;
}

/* test=resubmit: one head offered again and again without waiting, `count=`(1000) times; each NEEDS_RESET ends in a
   reset, and on. */
void test_resubmit(void)
{
    uint64_t broken = 0;
    open();
    for (uint64_t i = 0, count = param_number("count", 1000); i < count; i++) {
        offer(false);
        if (i % 16 == 15 && virtio_status(&virtio) & STATUS_NEEDS_RESET) {
            broken++;
            start();
        }
    }
    virtio_reset(&virtio);
    print("resubmit.needs_reset=%lu\n", broken);
}

/* test=toggle: reset and DRIVER_OK, `count=`(200) times as fast as it goes. */
void test_toggle(void)
{
    uint64_t count = param_number("count", 200);
    open();
    for (uint64_t i = 0; i < count; i++)
        start();
    virtio_reset(&virtio);
    print("toggled=%lu\n", count);
}

/* test=notify: every value in every width, into the queue's doorbell and beside it. Then a request must still work. */
void test_notify(void)
{
    open();
    for (uint32_t value = 0; value < 0x10000; value++)
        bus_write(queue->notify, 2, value);
    for (unsigned size = 1; size <= 8; size *= 2)
        for (unsigned bit = 0; bit < 64; bit++)
            for (unsigned offset = 0; offset < virtio.notify_size + 8; offset += size) {
                bus_write(virtio.notify + offset, size, 1ull << bit);
                bus_write(virtio.notify + offset, size, ~0ull >> bit);
            }
    print("notified=1\n");
}

/* test=flood: `bytes=`(1M) to `port=`(0x3f8), many with each instruction. */
void test_flood(void)
{
    uint64_t left = param_number("bytes", 1 << 20), total = left, size = 0x10000;
    uint16_t port = (uint16_t)param_number("port", 0x3f8);
    char *text = allocate(size, PAGE);
    for (uint64_t i = 0; i < size; i++)
        text[i] = i % 64 == 63 ? '\n' : (char)('a' + i % 26);
    while (left) {
        uint64_t count = left < size ? left : size;
        const char *from = text;
        left -= count;
        __asm__ volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(port) : "memory");
    }
    print("\nflooded=%lu\n", total);
}
