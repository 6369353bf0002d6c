/* A driver that breaks the rules on purpose. Each case starts from a valid chain of three descriptors, breaks one
   thing, kicks, and reports what became of it; then the device is reset and must serve a correct request again. */
#include "blk.h"
#include "hostile.h"
#include "net.h"
#include "tests.h"

static struct virtio virtio;
static struct queue *queue;
static struct desc *chain;              /* the three descriptors, in the ring's table or in an indirect one */
static struct blk_request *good;
static uint8_t *data;

#define PIECE 4096
#define HOLE (1ull << 45)

void target_find(struct virtio *device)
{
    static const struct { const char *name; unsigned type; } types[] = {
        {"blk", VIRTIO_BLK}, {"rng", VIRTIO_RNG}, {"console", VIRTIO_CONSOLE}, {"net", VIRTIO_NET}};
    const char *kind = param("type", "blk");
    unsigned i = 0;
    while (i + 1 < ARRAY_SIZE(types) && !same(kind, types[i].name))
        i++;
    require(virtio_find(device, types[i].type, (unsigned)param_number("dev", 0)), "no virtio-%s device", kind);
}

struct queue *target_start(struct virtio *device)
{
    bool net = device->type == VIRTIO_NET;
    unsigned index = net ? (unsigned)param_number("queue", 1) : device->type == VIRTIO_CONSOLE;
    virtio_negotiate(device, device->type == VIRTIO_BLK ? BLK_F_ALL : net ? NET_F_MRG_RXBUF | NET_F_CTRL_VQ : 0);
    virtio_queues(device, net ? 2 + !!(device->features & NET_F_CTRL_VQ) : index + 1, 0);
    require(index < device->queue_count, "there is no queue %u", index);
    virtio_ready(device);
    return &device->queues[index];
}

uint16_t target_flags(const struct queue *of)
{
    unsigned type = of->device->type;
    return type == VIRTIO_CONSOLE || (type == VIRTIO_NET && of->index) ? 0 : DESC_WRITE;
}

static void start(void) { queue = target_start(&virtio); }

static void valid_chain(bool indirect)
{
    chain = indirect ? queue->tables : (struct desc *)queue->desc;
    uint16_t flags = target_flags(queue);
    memset(good, 0, sizeof *good);
    good->status = BLK_NO_STATUS;
    chain[0] = (struct desc){(uint64_t)data + PIECE, 16, flags | DESC_NEXT, 1};
    chain[1] = (struct desc){(uint64_t)data, PIECE, flags | DESC_NEXT, 2};
    chain[2] = (struct desc){(uint64_t)data + 2 * PIECE, 1, flags, 0};
    if (virtio.type == VIRTIO_BLK) {
        chain[0] = (struct desc){(uint64_t)&good->header, 16, DESC_NEXT, 1};
        chain[2].address = (uint64_t)&good->status;
    }
    if (virtio.type == VIRTIO_NET && queue->index == 2)
        chain[2].flags = DESC_WRITE;                    /* a command's acknowledgement */
    if (indirect) {
        queue->desc[0].address = (uint64_t)chain;
        queue->desc[0].length = 48;
        queue->desc[0].flags = DESC_INDIRECT;
        queue->desc[0].next = 0;
    }
}

static void offer(uint16_t head, uint16_t advance)
{
    queue->avail->ring[queue->avail->index % queue->size] = head;
    fence();
    queue->avail->index = (uint16_t)(queue->avail->index + advance);
    fence();
    bus_write(queue->notify, 2, queue->index);
}

/* What came of it within `settle=` ms: needs-reset, used (with the status byte of blk), or nothing. */
static void outcome(const char *name, bool quiet)
{
    uint64_t deadline = now_ns() + (quiet ? 50 : param_number("settle", 1000)) * 1000000;
    uint8_t status;
    uint16_t before = queue->next_used;
    do {
        status = virtio_status(&virtio);
        if (!(status & STATUS_NEEDS_RESET) && queue->used->index == before)
            delay_us(500);
    } while (!(status & STATUS_NEEDS_RESET) && queue->used->index == before && now_ns() < deadline);
    const char *seen = queue->used->index != before ? "used" : "nothing";
    print("hostile.%s=%s", name, status & STATUS_NEEDS_RESET ? "needs-reset" : seen);
    if (virtio.type == VIRTIO_BLK && queue->used->index != before)
        print(" status 0x%x", good->status);
    print("\n");
}

/* Reset and do one correct request. */
static void recover(const char *name)
{
    void *token;
    uint32_t length;
    start();
    if (virtio.type == VIRTIO_NET)
        queue = &virtio.queues[1];                      /* what is sent needs no peer */
    memset(data + PIECE, 0, 16);
    struct segment segments[3] = {{data + PIECE, 16, target_flags(queue)}};
    unsigned count = 1;
    if (virtio.type == VIRTIO_BLK) {
        memset(good, 0, sizeof *good);
        good->status = BLK_NO_STATUS;
        segments[0] = (struct segment){&good->header, 16, false};
        segments[1] = (struct segment){data, 512, true};
        segments[2] = (struct segment){(void *)&good->status, 1, true};
        count = 3;
    }
    require(queue_add(queue, segments, count, good), "%s: fresh ring is full", name);
    queue_kick(queue);
    queue_await(queue);
    require(queue_pop(queue, &token, &length) && (virtio.type != VIRTIO_BLK || good->status == BLK_OK),
            "%s: the request after it ended with status 0x%x", name, good->status);
}

enum what { LOOP_SELF, LOOP_TWO, NEXT_WILD, ADDRESS_HOLE, ADDRESS_WRAPS, ADDRESS_BAR, ADDRESS_LAPIC, ADDRESS_END,
            LENGTH_HUGE, LENGTH_ZERO, NESTED, TABLE_ODD, TABLE_EMPTY, TABLE_HUGE, TABLE_HOLE, TABLE_NEXT, TABLE_END,
            TABLE_BAR,
            READ_AFTER_WRITE, NO_WRITABLE, SHORT_HEADER, ODD_DATA, HEADER_ONLY, STATUS_EMPTY };

static void break_chain(enum what what)
{
    volatile struct desc *head = &queue->desc[0];
    switch (what) {
    case LOOP_SELF: chain[0].next = 0; break;
    case LOOP_TWO: chain[1].next = 0; break;
    case NEXT_WILD: chain[1].next = 0xffff; break;
    case ADDRESS_HOLE: chain[1].address = HOLE; break;
    case ADDRESS_WRAPS: chain[1].address = 0ull - 16; break;
    case ADDRESS_BAR: chain[1].address = virtio.common & ~0xfffull; break;
    case ADDRESS_LAPIC: chain[1].address = acpi.lapic; break;
    case ADDRESS_END: chain[1].address = ram_end() - 512; break;
    case LENGTH_HUGE: chain[1].length = 0xffffffff; break;
    case LENGTH_ZERO: chain[1].length = 0; break;
    case NESTED: chain[1].flags |= DESC_INDIRECT; break;
    case TABLE_ODD: head->length = 47; break;
    case TABLE_EMPTY: head->length = 0; break;
    case TABLE_HUGE: head->length = 0xfffffff0; break;
    case TABLE_HOLE: head->address = HOLE; break;
    case TABLE_NEXT: head->flags = DESC_INDIRECT | DESC_NEXT; break;
    case TABLE_END: head->address = ram_end() - 16; break;
    case TABLE_BAR: head->address = virtio.common & ~0xfffull; break;
    case READ_AFTER_WRITE: chain[0].flags |= DESC_WRITE; chain[1].flags = DESC_NEXT; break;
    case NO_WRITABLE: chain[1].flags = DESC_NEXT; chain[2].flags = 0; break;
    case SHORT_HEADER: chain[0].length = 15; break;
    case ODD_DATA: chain[1].length = 100; break;
    case HEADER_ONLY: chain[0].flags &= (uint16_t)~DESC_NEXT; break;
    case STATUS_EMPTY: chain[2].length = 0; break;
    }
}

static const struct broken {
    const char *name;
    enum what what;
    bool indirect;
} broken[] = {
    {"loop-self", LOOP_SELF, false}, {"loop-two", LOOP_TWO, false}, {"next-wild", NEXT_WILD, false},
    {"address-hole", ADDRESS_HOLE, false}, {"address-wraps", ADDRESS_WRAPS, false}, {"address-bar", ADDRESS_BAR, false},
    {"address-lapic", ADDRESS_LAPIC, false}, {"address-end", ADDRESS_END, false}, {"length-huge", LENGTH_HUGE, false},
    {"length-zero", LENGTH_ZERO, false}, {"read-after-write", READ_AFTER_WRITE, false},
    {"no-writable", NO_WRITABLE, false},
    {"short-header", SHORT_HEADER, false}, {"odd-data", ODD_DATA, false}, {"header-only", HEADER_ONLY, false},
    {"status-empty", STATUS_EMPTY, false}, {"indirect-loop", LOOP_TWO, true}, {"indirect-next-wild", NEXT_WILD, true},
    {"indirect-address-hole", ADDRESS_HOLE, true}, {"indirect-nested", NESTED, true}, {"indirect-odd", TABLE_ODD, true},
    {"indirect-empty", TABLE_EMPTY, true}, {"indirect-huge", TABLE_HUGE, true}, {"indirect-hole", TABLE_HOLE, true},
    {"indirect-and-next", TABLE_NEXT, true}, {"indirect-end", TABLE_END, true}, {"indirect-bar", TABLE_BAR, true},
};

static void offer_wild_head(void) { offer(queue->size, 1); }
static void offer_last_head(void) { offer(0xffff, 1); }
static void jump_ahead(void) { offer(0, (uint16_t)(queue->size + 1)); }
static void jump_far(void) { offer(0, 0x8000); }
static void jump_back(void) { offer(0, 0xffff); }

static void offer_twice(void)
{
    queue->avail->ring[1] = 0;
    offer(0, 2);
}

/* Enable a queue whose rings lie at `where`, then kick. */
static void rings_at(uint64_t desc, uint64_t avail, uint64_t used)
{
    virtio_negotiate(&virtio, 0);
    bus_write(virtio.common + C_QUEUE_SELECT, 2, queue->index);
    uint64_t rings[3] = {desc, avail, used};
    for (unsigned i = 0; i < 3; i++) {
        bus_write(virtio.common + C_DESC + i * 8, 4, (uint32_t)rings[i]);
        bus_write(virtio.common + C_DESC + i * 8 + 4, 4, rings[i] >> 32);
    }
    bus_write(virtio.common + C_QUEUE_ENABLE, 2, 1);
    bus_write(virtio.common + C_STATUS, 1, 15);
    memset((void *)queue->used, 0, 8);
    queue->next_used = 0;
    valid_chain(false);
    queue->avail->index = 0;
    offer(0, 1);
}

static void rings_in_hole(void) { rings_at(HOLE, HOLE + PAGE, HOLE + 2 * PAGE); }
static void rings_wrap(void) { rings_at(0ull - 16, 0ull - 16, 0ull - 16); }
static void rings_at_zero(void) { rings_at(0, 0, 0); }
static void rings_at_end(void) { rings_at((uint64_t)queue->desc, (uint64_t)queue->avail, ram_end() - 16); }
static void rings_in_bar(void)
{
    rings_at((uint64_t)queue->desc, (uint64_t)queue->avail, virtio.common & ~0xfffull);
}

static void rings_in_lapic(void) { rings_at(acpi.lapic, (uint64_t)queue->avail, (uint64_t)queue->used); }
static void rings_in_ecam(void) { rings_at((uint64_t)queue->desc, acpi.ecam, (uint64_t)queue->used); }

static void rings_odd(void)
{
    rings_at((uint64_t)queue->desc + 1, (uint64_t)queue->avail + 1, (uint64_t)queue->used + 1);
}

/* Every register of a live queue gets rubbish; the queue must carry on with what it was enabled with. */
static void live_registers(void)
{
    bus_write(virtio.common + C_QUEUE_SELECT, 2, queue->index);
    for (unsigned offset = C_QUEUE_SIZE; offset < 56; offset += 2)
        if (offset != C_QUEUE_ENABLE && offset != C_QUEUE_VECTOR)
            bus_write(virtio.common + offset, 2, 0x3333);
    bus_write(virtio.common + C_DRIVER_FEATURE, 4, 0x33333333);
    offer(0, 1);
}

static void queue_sizes(void)
{
    static const uint16_t sizes[] = {0, 1, 3, 7, 1000, 32768, 32769, 65535};
    for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++) {
        virtio_negotiate(&virtio, 0);
        bus_write(virtio.common + C_QUEUE_SELECT, 2, queue->index);
        bus_write(virtio.common + C_QUEUE_SIZE, 2, sizes[i]);
        print("size.%u=%lu\n", sizes[i], bus_read(virtio.common + C_QUEUE_SIZE, 2));
        bus_write(virtio.common + C_QUEUE_ENABLE, 2, 1);
        bus_write(virtio.common + C_STATUS, 1, 15);
        bus_write(queue->notify, 2, queue->index);
    }
}

static void queue_numbers(void)
{
    for (unsigned index = 1; index < 0x10000; index = index * 2 + 1) {
        bus_write(virtio.common + C_QUEUE_SELECT, 2, index);
        uint64_t size = bus_read(virtio.common + C_QUEUE_SIZE, 2);
        if (index >= bus_read(virtio.common + C_NUM_QUEUES, 2))
            require(!size, "queue %u, which does not exist, has size %lu", index, size);
        if (!size)
            for (unsigned offset = C_QUEUE_SIZE; offset < 56; offset += 2)
                bus_write(virtio.common + offset, 2, 0x3333);
    }
    offer(0, 1);
}

static void notify_all(void)
{
    for (uint32_t offset = 0; offset < virtio.notify_size && offset < 4096; offset += 2)
        bus_write(virtio.notify + offset, 2, offset);
    for (uint32_t value = 1; value < 0x10000; value = value * 2 + 1)
        bus_write(virtio.notify, 2, value);
    offer(0, 1);
}

static void statuses(void)
{
    for (unsigned value = 255; value; value--)
        bus_write(virtio.common + C_STATUS, 1, value);
    virtio_reset(&virtio);
    bus_write(virtio.common + C_STATUS, 1, 3);
    bus_write(virtio.common + C_DRIVER_FEATURE_SELECT, 4, 1);
    bus_write(virtio.common + C_DRIVER_FEATURE, 4, 0);
    bus_write(virtio.common + C_STATUS, 1, 11);
    print("features_ok_without_version_1=%u\n", !!(virtio_status(&virtio) & STATUS_FEATURES_OK));
    virtio_reset(&virtio);
    bus_write(virtio.common + C_STATUS, 1, 3);
    for (unsigned select = 0; select < 4; select++) {
        bus_write(virtio.common + C_DRIVER_FEATURE_SELECT, 4, select);
        bus_write(virtio.common + C_DRIVER_FEATURE, 4, 0xffffffff);
    }
    bus_write(virtio.common + C_STATUS, 1, 11);
    print("features_ok_with_all_features=%u\n", !!(virtio_status(&virtio) & STATUS_FEATURES_OK));
}

/* Reset with requests in flight: once status reads 0 no buffer may change any more. */
static void reset_in_flight(void)
{
    for (unsigned i = 0; i < 32 && i * 3 + 2 < queue->size; i++) {
        uint16_t head = (uint16_t)(i * 3);
        for (unsigned j = 0; j < 3; j++) {
            queue->desc[head + j].address = chain[j].address;
            queue->desc[head + j].length = chain[j].length;
            queue->desc[head + j].flags = chain[j].flags;
            queue->desc[head + j].next = (uint16_t)(head + j + 1);
        }
        queue->avail->ring[i] = head;
    }
    offer(0, queue->size >= 96 ? 32 : 1);
    virtio_reset(&virtio);
    memset(data, 0x77, 3 * PIECE);
    uint16_t used = queue->used->index;
    delay_us(100000);
    for (unsigned i = 0; i < 3 * PIECE; i++)
        require(data[i] == 0x77, "byte %u of a buffer was written after the reset", i);
    require(queue->used->index == used, "the used ring was written after the reset");
}

static const struct deed {
    const char *name;
    void (*run)(void);
    bool quiet;                         /* nothing is expected to come of it */
} deeds[] = {
    {"head-wild", offer_wild_head, false}, {"head-ffff", offer_last_head, false},
    {"avail-ahead", jump_ahead, false}, {"avail-far", jump_far, false}, {"avail-back", jump_back, false},
    {"head-twice", offer_twice, false}, {"rings-hole", rings_in_hole, false}, {"rings-wrap", rings_wrap, false},
    {"rings-zero", rings_at_zero, true}, {"rings-end", rings_at_end, false}, {"rings-bar", rings_in_bar, false},
    {"rings-lapic", rings_in_lapic, false}, {"rings-ecam", rings_in_ecam, false},
    {"rings-odd", rings_odd, true}, {"live-registers", live_registers, false},
    {"queue-sizes", queue_sizes, true}, {"queue-numbers", queue_numbers, false},
    {"notify-all", notify_all, false}, {"statuses", statuses, true}, {"reset-in-flight", reset_in_flight, true},
};

static bool listed(const char *list, const char *name)
{
    size_t length = strlen(name);
    while (*list) {
        if (starts(list, name) && (!list[length] || list[length] == ','))
            return true;
        while (*list && *list++ != ',')
            ;
    }
    return false;
}

static bool chosen(const char *name)
{
    const char *wanted = param("case", "all");
    return (same(wanted, "all") || listed(wanted, name)) && !listed(param("skip", ""), name);
}

/* test=hostile: `type=` and `queue=` as in hostile.h; `case=NAME,NAME` or all, without those of `skip=`; `settle=` ms are
   waited for an outcome. */
void test_hostile(void)
{
    unsigned done = 0;
    target_find(&virtio);
    good = allocate(sizeof *good, 64);
    data = allocate(4 * PIECE, PAGE);
    for (unsigned i = 0; i < ARRAY_SIZE(broken); i++) {
        if (!chosen(broken[i].name))
            continue;
        start();
        if (broken[i].indirect && !(virtio.features & F_INDIRECT))
            continue;
        valid_chain(broken[i].indirect);
        break_chain(broken[i].what);
        offer(0, 1);
        outcome(broken[i].name, false);
        recover(broken[i].name);
        done++;
    }
    for (unsigned i = 0; i < ARRAY_SIZE(deeds); i++) {
        if (!chosen(deeds[i].name))
            continue;
        start();
        valid_chain(false);
        deeds[i].run();
        outcome(deeds[i].name, deeds[i].quiet);
        recover(deeds[i].name);
        done++;
    }
    require(done, "no case %s", param("case", "all"));
    print("cases=%u\n", done);
}
