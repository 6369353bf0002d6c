/* What no network driver should ask for. Each case starts the card, offers chains to one of its queues, and says what
   came of it; then the card is started again and must carry a frame to the host and back. */
#include "net.h"
#include "tests.h"

#define HOLE (1ull << 45)
#define PIECE 4096
#define PIECES 20

enum { RX, TX, CONTROL };

struct chain {
    const char *name;
    unsigned queue, times;              /* that many chains, all alike */
    uint8_t content[24];                /* of the first segment */
    struct segment segments[3];         /* address: an offset into `data`, unless it is above */
    unsigned whole;                     /* instead of the segments: so many pieces, all sent or all received */
    bool echo;                          /* meanwhile the host sends a frame of 1500 bytes */
};

static struct net net;
static uint8_t *data, *frame;
static uint64_t serial;

#define R(address, length) {(void *)(address), length, false}
#define W(address, length) {(void *)(address), length, true}
static const struct chain cases[] = {
    {"tx-empty", TX, 1, {0}, {R(0, 0)}, 0, false},
    {"tx-short", TX, 1, {0}, {R(0, 11)}, 0, false},
    {"tx-header-only", TX, 1, {0}, {R(0, 12)}, 0, false},
    {"tx-runt", TX, 1, {0}, {R(0, 12), R(64, 1)}, 0, false},
    {"tx-split-header", TX, 1, {0}, {R(0, 5), R(5, 7), R(64, 60)}, 0, false},
    {"tx-writable", TX, 1, {0}, {W(0, 72)}, 0, false},
    {"tx-writable-tail", TX, 1, {0}, {R(0, 72), W(PIECE, 64)}, 0, false},
    {"tx-large", TX, 1, {0}, {R(0, 0)}, PIECES, false},
    {"tx-flags", TX, 1, {0xff}, {R(0, 72)}, 0, false},
    {"tx-gso-unknown", TX, 1, {1, 0x7f, 54, 0, 100, 0, 34, 0, 16, 0}, {R(0, 1500)}, 0, false},
    {"tx-gso-size-0", TX, 1, {1, 1, 54, 0, 0, 0, 34, 0, 16, 0}, {R(0, 1500)}, 0, false},
    {"tx-gso-far", TX, 1, {1, 1, 0xff, 0xff, 1, 0, 0xff, 0xff, 0xff, 0xff}, {R(0, 1500)}, 0, false},
    {"tx-csum-far", TX, 1, {1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, {R(0, 72)}, 0, false},
    {"tx-hole", TX, 1, {0}, {R(0, 12), R(HOLE, 60)}, 0, false},
    {"tx-wraps", TX, 1, {0}, {R(0, 12), R(0ull - 16, 60)}, 0, false},
    {"rx-empty", RX, 1, {0}, {W(0, 0)}, 0, true},
    {"rx-short", RX, 1, {0}, {W(0, 11)}, 0, true},
    {"rx-readable", RX, 1, {0}, {R(0, 2048)}, 0, true},
    {"rx-hole", RX, 1, {0}, {W(0, 12), W(HOLE, 2036)}, 0, true},
    {"rx-wraps", RX, 1, {0}, {W(0ull - 16, 2048)}, 0, true},
    {"rx-huge", RX, 1, {0}, {W(0, 0xffffffff)}, 0, true},
    {"rx-header-only", RX, 1, {0}, {W(0, 12)}, 0, true},
    {"rx-no-room", RX, 3, {0}, {W(0, 100)}, 0, true},
    {"rx-crumbs", RX, 200, {0}, {W(0, 13)}, 0, true},
    {"rx-split-header", RX, 1, {0}, {W(0, 5), W(5, 7), W(64, 2048)}, 0, true},
    {"rx-large", RX, 2, {0}, {W(0, 0)}, PIECES, true},
    {"control-empty", CONTROL, 1, {0}, {R(0, 0)}, 0, false},
    {"control-one-byte", CONTROL, 1, {0}, {R(0, 1), W(64, 1)}, 0, false},
    {"control-no-data", CONTROL, 1, {0, 0}, {R(0, 2), W(64, 1)}, 0, false},
    {"control-much-data", CONTROL, 1, {0, 0, 1}, {R(0, 2), R(PIECE, 3 * PIECE), W(64, 1)}, 0, false},
    {"control-no-ack", CONTROL, 1, {0, 0, 1}, {R(0, 3)}, 0, false},
    {"control-empty-ack", CONTROL, 1, {0, 0, 1}, {R(0, 3), W(64, 0)}, 0, false},
    {"control-long-ack", CONTROL, 1, {0, 0, 1}, {R(0, 3), W(64, 2048)}, 0, false},
    {"control-only-ack", CONTROL, 1, {0}, {W(64, 1)}, 0, false},
    {"control-hole", CONTROL, 1, {0, 0}, {R(0, 2), R(HOLE, 1), W(64, 1)}, 0, false},
    {"control-ack-hole", CONTROL, 1, {0, 0, 1}, {R(0, 3), W(HOLE, 1)}, 0, false},
    {"control-table-lies", CONTROL, 1, {1, 0, 0xff, 0xff, 0xff, 0xff}, {R(0, 14), W(64, 1)}, 0, false},
    {"control-table-far", CONTROL, 1, {1, 0, 0, 0, 0, 0, 0, 0, 0, 0x10}, {R(0, 24), W(64, 1)}, 0, false},
    {"control-large", CONTROL, 1, {0}, {R(0, 0)}, PIECES, false},
    {"control-flood", CONTROL, 80, {2, 0, 9, 0}, {R(0, 4), W(64, 1)}, 0, false},
};

static void offer(const struct chain *chain, struct queue *queue)
{
    struct segment segments[PIECES];
    unsigned count = 0;
    memcpy(data, chain->content, sizeof chain->content);
    for (; count < chain->whole; count++)
        segments[count] = (struct segment){data + count * PIECE, PIECE, chain->queue == RX};
    for (unsigned i = 0; !chain->whole && i < ARRAY_SIZE(chain->segments); i++) {
        const struct segment *one = &chain->segments[i];
        uint64_t address = (uint64_t)one->address;
        if (one->length || !i)
            segments[count++] = (struct segment){address < HOLE ? data + address : one->address, one->length,
                                                 one->device_writes};
    }
    for (unsigned i = 0; i < chain->times && i < queue->size / 2u; i++)
        require(queue_add(queue, segments, count, data), "%s: no room in the ring for chain %u", chain->name, i);
    queue_kick(queue);
}

static void ask_for_echo(uint32_t size)
{
    struct net_header plain = {0};
    memset(frame, 0x5a, size);
    frame_fill(&net, (struct frame *)frame, FRAME_ECHO, 0, ++serial, size);
    net_send(&net, 0, &plain, frame, size);
    queue_kick(net.pair[0].tx);
}

static bool needs_reset(void) { return virtio_status(&net.virtio) & STATUS_NEEDS_RESET; }

static void outcome(const struct chain *chain, struct queue *queue)
{
    uint64_t deadline = now_ns() + param_number("settle", 300) * 1000000;
    while (!needs_reset() && (uint16_t)(queue->used->index - queue->next_used) < chain->times && now_ns() < deadline)
        delay_us(200);
    if (needs_reset())
        print("net.%s=needs-reset\n", chain->name);
    else
        print("net.%s=%u\n", chain->name, (uint16_t)(queue->used->index - queue->next_used));
}

/* Start afresh; a frame must go to the host and come back. */
static void recover(const char *name)
{
    struct net_header header;
    uint32_t length;
    net.unposted = 0;
    net_open(&net, 1);
    ask_for_echo(600);
    for (uint64_t deadline = now_ns() + 10000000000; now_ns() < deadline;) {
        queue_wait(net.pair[0].rx, rdtsc() + ns_to_tsc(1000000));
        while (net_receive(&net, 0, &header, frame, &length))
            if (frame_ours(frame, length) && ((struct frame *)frame)->number == serial)
                return;
    }
    fail("%s: the frame after it did not come back, status 0x%x", name, virtio_status(&net.virtio));
}

/* test=net-hostile: all of it, or `case=`; needs a host that sends back. `settle=`(300) ms are waited for an outcome,
   which is how many of the chains were used, or needs-reset. */
void test_net_hostile(void)
{
    unsigned done = 0;
    data = allocate(PIECES * PIECE, PAGE);
    frame = allocate(NET_LARGEST, PAGE);
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        const struct chain *chain = &cases[i];
        if (!same(param("case", chain->name), chain->name))
            continue;
        net.unposted = chain->queue == RX ? ~0u : 0;
        net_open(&net, 1);
        if (chain->queue == CONTROL && !net.control)
            continue;
        struct queue *queue = chain->queue == RX ? net.pair[0].rx : chain->queue == TX ? net.pair[0].tx : net.control;
        offer(chain, queue);
        if (chain->echo && !needs_reset())
            ask_for_echo(1500);
        outcome(chain, queue);
        recover(chain->name);
        done++;
    }
    require(done, "no case %s", param("case", ""));
    print("cases=%u\n", done);
}
