/* Numbered frames that the host sends back (net-send), and measurements (net-bench). */
#include "net.h"
#include "stats.h"
#include "tests.h"

#define WINDOW 16384                    /* frames whose fate may be open */

/* One queue pair's stream, with `depth` frames under way: those before one that is back are late or lost, and hold up
   nothing. What is not back after `patience` is lost; it may come back late, never twice. */
struct stream {
    unsigned pair, depth;
    uint64_t count, next, patience;
    uint8_t *back;                  /* by number, a bit: it came back */
    uint64_t *begin;                /* by number modulo WINDOW */
    uint64_t oldest;                /* below it all are back or lost */
    uint64_t received, doubled, late, lost, highest, strange, last, longest_gap;
    struct stats stats;
};

static struct net net;
static uint8_t *frame, *sent;
static bool stopped;

static bool is_back(const struct stream *stream, uint64_t number)
{
    return stream->back[number / 8] >> number % 8 & 1;
}

static void came_back(struct stream *stream, const struct frame *got)
{
    uint64_t number = got->number, now = rdtsc();
    require(number && number < stream->next, "frame %lu came back, it was never sent", number);
    if (is_back(stream, number)) {
        stream->doubled++;
        print("twice.%u=%lu\n", stream->pair, number);
        return;
    }
    stream->back[number / 8] |= (uint8_t)(1 << number % 8);
    stream->late += number < stream->highest;
    stream->highest = number > stream->highest ? number : stream->highest;
    stream->received++;
    stream->lost -= number < stream->oldest;            /* it was given up too early */
    stats_add(&stream->stats, now - got->time);
    if (stream->last && now - stream->last > stream->longest_gap)
        stream->longest_gap = now - stream->last;
    stream->last = now;
}

/* Move `oldest` over all that is back or overdue. */
static void settle(struct stream *stream)
{
    uint64_t now = rdtsc();
    while (stream->oldest < stream->next) {
        bool back = is_back(stream, stream->oldest);
        if (!back && now - stream->begin[stream->oldest % WINDOW] < stream->patience)
            break;
        stream->lost += !back;
        stream->oldest++;
    }
}

/* Take all that came in on a pair; the stream is the one that the frame names. */
static unsigned take(struct stream *streams, unsigned pair)
{
    struct net_header header;
    uint32_t length;
    unsigned taken = 0;
    while (net_receive(&net, pair, &header, frame, &length)) {
        const struct frame *got = (const struct frame *)frame;
        taken++;
        bool ours = frame_ours(frame, length);
        if (ours && got->kind == FRAME_STOP)
            stopped = true;
        else if (ours && (got->kind & ~FRAME_UNCHECKED) == FRAME_ECHO && got->pair < net.pairs)
            came_back(&streams[got->pair], got);
        else
            streams[pair].strange++;
    }
    return taken;
}

static bool more(const struct stream *stream, uint64_t end)
{
    return !stopped && stream->next <= stream->count && (!end || (int64_t)(rdtsc() - end) < 0);
}

static uint64_t under_way(const struct stream *stream)
{
    return stream->next - (stream->highest < stream->oldest ? stream->oldest : stream->highest + 1);
}

/* Send while the window is open; whether anything is still to be sent or to come back. */
static bool push(struct stream *stream, uint8_t kind, uint32_t size, uint64_t end)
{
    static const struct net_header plain;
    settle(stream);
    while (more(stream, end) && stream->next - stream->oldest < WINDOW && under_way(stream) < stream->depth) {
        frame_fill(&net, (struct frame *)sent, kind, stream->pair, stream->next, size);
        stream->begin[stream->next % WINDOW] = rdtsc();
        stream->next++;
        net_send(&net, stream->pair, &plain, sent, size);
    }
    queue_kick(net.pair[stream->pair].tx);
    return more(stream, end) || stream->oldest < stream->next;
}

static uint64_t rate(uint64_t count, uint64_t ns) { return ns ? count * 1000000000 / ns : 0; }

static void report(const struct stream *streams, uint64_t ns)
{
    static struct stream total;
    uint64_t sum = 0, kicks = 0, avoided = 0;
    memset(&total, 0, sizeof total);
    for (unsigned i = 0; i < net.pairs; i++) {
        const struct stream *one = &streams[i];
        sum += one->next - 1;
        total.received += one->received, total.doubled += one->doubled, total.late += one->late;
        total.lost += one->lost, total.strange += one->strange;
        total.longest_gap = one->longest_gap > total.longest_gap ? one->longest_gap : total.longest_gap;
        stats_merge(&total.stats, &one->stats);
        kicks += net.pair[i].tx->kicks + net.pair[i].rx->kicks;
        avoided += net.pair[i].tx->kicks_avoided + net.pair[i].rx->kicks_avoided;
        print("lost.%u=%lu\n", i, one->lost);
    }
    print("sent=%lu\nreceived=%lu\nlost=%lu\ndoubled=%lu\nlate=%lu\nstrange=%lu\n", sum, total.received, total.lost,
          total.doubled, total.late, total.strange);
    print("elapsed_us=%lu\npps=%lu\nstall_us=%lu\n", ns / 1000, rate(total.received, ns),
          tsc_to_ns(total.longest_gap) / 1000);
    stats_print(&total.stats, "lat");
    print("kicks=%lu\nkicks_avoided=%lu\nirqs=%lu\n", kicks, avoided, device_irqs(&net.virtio));
    require(net.virtio.irq == IRQ_POLL || param_is("idle", "spin") || net.pairs > 1 || !total.received ||
            device_irqs(&net.virtio), "%lu frames came back and not one interrupt", total.received);
    require(!total.doubled, "%lu frames came back twice", total.doubled);
}

static void open_for_load(uint32_t size)
{
    require(size >= sizeof(struct frame) && size <= NET_LARGEST, "bs=%u is outside %lu..%u", size,
            sizeof(struct frame), NET_LARGEST);
    net_open(&net, (unsigned)param_number("pairs", 1));
    frame = allocate(NET_LARGEST, PAGE);
    sent = allocate(NET_LARGEST, PAGE);
    stopped = false;
    uint64_t state = param_number("seed", 1);
    for (uint32_t i = 0; i + 8 <= size; i += 8)
        *(uint64_t *)(sent + i) = random_next(&state);
}

static void run_streams(uint8_t kind)
{
    uint32_t size = (uint32_t)param_number("bs", 256);
    uint64_t duration = param_number("duration_ms", 0), count = param_number("count", duration ? 4 << 20 : 1000);
    unsigned depth = (unsigned)param_number("depth", kind & FRAME_UNCHECKED ? 1 : 16);
    require(depth && depth <= 4096, "depth=%u is outside 1..4096", depth);
    open_for_load(size);
    struct stream *streams = allocate(net.pairs * sizeof *streams, 64);
    for (unsigned i = 0; i < net.pairs; i++) {
        struct stream *stream = &streams[i];
        memset(stream, 0, sizeof *stream);
        stream->pair = i, stream->depth = depth, stream->count = count, stream->next = stream->oldest = 1;
        stream->patience = ns_to_tsc(param_number("patience_ms", 1000) * 1000000);
        stream->back = allocate(count / 8 + 1, 64);
        stream->begin = allocate(WINDOW * sizeof(uint64_t), 64);
    }
    print("pairs=%u\ndepth=%u\nbs=%u\nfeatures=0x%lx\n", net.pairs, depth, size, net.virtio.features);
    uint64_t begin = rdtsc(), end = duration ? begin + ns_to_tsc(duration * 1000000) : 0;
    for (bool busy = true; busy;) {
        unsigned taken = 0;
        busy = false;
        for (unsigned i = 0; i < net.pairs; i++)
            busy |= push(&streams[i], kind, size, end);
        for (unsigned i = 0; i < net.pairs; i++)
            taken += take(streams, i);
        if (!taken && busy && net.pairs == 1)
            queue_wait(net.pair[0].rx, rdtsc() + ns_to_tsc(1000000));
    }
    report(streams, tsc_to_ns(rdtsc() - begin));
}

/* test=net-send: numbered frames with a checksum, which the host sends back; ends the run if one came twice. */
void test_net_send(void) { run_streams(FRAME_ECHO); }

/* Make of `sent` one TCP segment of `size` bytes that the host is to cut into pieces of 1448. */
static struct net_header make_segment(uint32_t size)
{
    static const uint8_t ip[40] = {0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 9, 9, 2, 10, 9, 9, 1,
                                   0x30, 0x39, 0, 9, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0};
    uint32_t sum = 0;
    memset(sent, 0xff, 6);
    memcpy(sent + 6, net.mac, 6);
    sent[12] = 8, sent[13] = 0;
    memcpy(sent + 14, ip, sizeof ip);
    sent[16] = (uint8_t)((size - 14) >> 8), sent[17] = (uint8_t)(size - 14);
    for (unsigned i = 14; i < 34; i += 2)
        sum += (uint32_t)(sent[i] << 8 | sent[i + 1]);
    sum = ~((sum & 0xffff) + (sum >> 16)) & 0xffff;
    sent[24] = (uint8_t)(sum >> 8), sent[25] = (uint8_t)sum;
    return (struct net_header){NET_NEEDS_CSUM, NET_GSO_TCP4, 54, 1448, 34, 16, 0};
}

static void bench_send(void)
{
    uint32_t size = (uint32_t)param_number("bs", 1514);
    uint64_t duration = param_number("duration_ms", 0), count = param_number("count", duration ? ~0ull : 10000);
    open_for_load(size);
    struct net_header header = {0};
    if (param_number("gso", 0)) {
        require(net.virtio.features & NET_F_HOST_TSO, "gso=1: the device cuts no segments");
        header = make_segment(size);
    } else {
        frame_fill(&net, (struct frame *)sent, FRAME_DATA | FRAME_UNCHECKED, 0, 0, size);
    }
    uint64_t begin = rdtsc(), end = duration ? begin + ns_to_tsc(duration * 1000000) : 0;
    while (net.pair[0].sent < count && (!end || (int64_t)(rdtsc() - end) < 0)) {
        net_send(&net, 0, &header, sent, size);
        if (net.pair[0].sent % 16 == 0)
            queue_kick(net.pair[0].tx);
    }
    queue_kick(net.pair[0].tx);
    struct queue *tx = net.pair[0].tx;
    uint64_t limit = now_ns() + 30000000000;
    while (tx->used->index != tx->avail->index)
        require(now_ns() < limit, "%u frames are not sent", (uint16_t)(tx->avail->index - tx->used->index));
    uint64_t ns = tsc_to_ns(rdtsc() - begin);
    print("sent=%lu\npps=%lu\nmbit_s=%lu\nkicks=%lu\n", net.pair[0].sent, rate(net.pair[0].sent, ns),
          rate(net.pair[0].bytes_out * 8, ns) / 1000000, tx->kicks);
}

static void bench_receive(void)
{
    struct net_header header;
    uint32_t length;
    uint64_t first = 0, last = 0;
    open_for_load(64);
    print("ready=1\n");
    while (!stopped) {
        queue_await(net.pair[0].rx);
        while (net_receive(&net, 0, &header, frame, &length)) {
            last = rdtsc();
            first = first ? first : last;
            stopped = stopped || (frame_ours(frame, length) && ((struct frame *)frame)->kind == FRAME_STOP);
        }
    }
    uint64_t ns = tsc_to_ns(last - first);
    print("received=%lu\npps=%lu\nmbit_s=%lu\nirqs=%lu\n", net.pair[0].received, rate(net.pair[0].received, ns),
          rate(net.pair[0].bytes_in * 8, ns) / 1000000, device_irqs(&net.virtio));
}

/* test=net-bench: op=rr (round trips, depth=1), op=tx (gso=1: in segments of bs=), op=rx (until one says stop). */
void test_net_bench(void)
{
    if (param_is("op", "tx"))
        bench_send();
    else if (param_is("op", "rx"))
        bench_receive();
    else
        run_streams(FRAME_ECHO | FRAME_UNCHECKED);
}
