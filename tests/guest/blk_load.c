/* A closed loop of block requests at a given depth, on one or more queues (one CPU each), with a journal of what
   every block must hold. The journal is the proof: nothing lost, nothing written twice or out of order. */
#include "blk.h"
#include "stats.h"
#include "tests.h"

struct entry {
    uint32_t version, crc;      /* version 0: never written */
};

struct slot {
    struct blk_request request;
    uint64_t block;
    uint32_t crc, version;
    bool asks;                  /* reads the stop sector instead of a block */
};

/* What one queue does; each works on its own stripe of blocks. */
struct load {
    struct blk *blk;
    struct queue *queue;
    unsigned index, depth, read_percent;
    uint32_t size;
    uint64_t first, blocks, count, flush_every, deadline, progress, seed, state;
    bool verify, sequential, bench, dry;
    struct entry *journal;
    uint8_t *busy;
    struct slot *slots;
    uint64_t gap_limit, stop_sector, ask_again;
    uint64_t submitted, completed, reads, writes, flushes, errors, next_block, last_completion, longest_gap;
    struct stats stats, gaps;   /* of a request; without a completion, if it was gap_limit or more */
};

#define ASK_MS 50

static struct blk blk;
static volatile bool stopped;

static uint64_t pick(struct load *load)
{
    for (;;) {
        uint64_t block = load->sequential ? load->next_block++ % load->blocks
                                          : random_next(&load->state) % load->blocks;
        if (load->bench || !load->busy[block])
            return block;
    }
}

static void prepare(struct load *load, struct slot *slot)
{
    struct blk_request *request = &slot->request;
    bool flush = load->flush_every && load->submitted % load->flush_every == load->flush_every - 1;
    request->header.sector = 0;
    request->length = 0;
    slot->asks = load->stop_sector && (int64_t)(rdtsc() - load->ask_again) >= 0;
    if (slot->asks) {
        load->ask_again = rdtsc() + ns_to_tsc(ASK_MS * 1000000ull);
        request->header.type = BLK_IN;
        request->header.sector = load->stop_sector;
        request->length = 512;
        load->submitted++;
        return;
    }
    load->submitted++;
    if (flush) {
        request->header.type = BLK_FLUSH;
        return;
    }
    uint64_t block = slot->block = pick(load);
    bool reading = random_next(&load->state) % 100 < load->read_percent;
    request->header.type = reading ? BLK_IN : BLK_OUT;
    request->header.sector = (load->first + block) * (load->size / 512);
    request->length = load->size;
    if (load->bench)
        return;
    load->busy[block] = 1;
    if (reading)
        return;
    slot->version = load->journal[block].version + 1;
    pattern_fill(request->data, load->size, load->first + block, slot->version, load->seed);
    slot->crc = crc32(0, request->data, load->size);
}

static void check_block(struct load *load, uint64_t block, const void *data)
{
    const uint64_t *words = data;
    struct entry *entry = &load->journal[block];
    if (!entry->version)
        return;
    require(crc32(0, data, load->size) == entry->crc,
            "corrupt: block %lu holds block %lu version %lu seed %lu, expected version %u seed %lu",
            load->first + block, words[0], words[1], words[2], entry->version, load->seed);
}

static void complete(struct load *load, struct slot *slot)
{
    struct blk_request *request = &slot->request;
    uint64_t now = rdtsc(), since = load->last_completion > request->begin ? load->last_completion : request->begin;
    stats_add(&load->stats, now - request->begin);
    if (now - since > load->longest_gap)
        load->longest_gap = now - since;
    if (load->gap_limit && now - since >= load->gap_limit)
        stats_add(&load->gaps, now - since);
    load->last_completion = now;
    load->completed++;
    load->reads += request->header.type == BLK_IN;
    load->writes += request->header.type == BLK_OUT;
    load->flushes += request->header.type == BLK_FLUSH;
    if (request->status != BLK_OK) {
        load->errors++;
        require(param_number("tolerate", 0), "request type %u sector %lu: status 0x%x", request->header.type,
                request->header.sector, request->status);
    } else if (slot->asks) {
        stopped = stopped || *(const uint64_t *)request->data;
    } else if (!load->bench && request->header.type == BLK_OUT) {
        load->journal[slot->block] = (struct entry){slot->version, slot->crc};
    } else if (!load->bench && request->header.type == BLK_IN) {
        check_block(load, slot->block, request->data);
    }
    if (!load->bench && !slot->asks && request->header.type != BLK_FLUSH)
        load->busy[slot->block] = 0;
}

static bool more(const struct load *load)
{
    return !stopped && load->submitted < load->count && (!load->deadline || (int64_t)(rdtsc() - load->deadline) < 0);
}

static void run(void *argument)
{
    struct load *load = argument;
    unsigned outstanding = 0;
    uint64_t report = now_ns() + load->progress;
    struct slot *spare[512];
    unsigned spares = 0;
    for (unsigned i = 0; i < load->depth; i++)
        spare[spares++] = &load->slots[i];
    for (;;) {
        while (spares && more(load)) {
            struct slot *slot = spare[--spares];
            prepare(load, slot);
            require(blk_submit(load->queue, &slot->request), "the ring is too small for depth %u", load->depth);
            outstanding++;
        }
        queue_kick(load->queue);
        if (!outstanding)
            break;
        queue_await(load->queue);
        void *token;
        uint32_t written;
        while (queue_pop(load->queue, &token, &written)) {
            struct slot *slot = token;                      /* the request is its first member */
            bool filled = slot->request.header.type == BLK_IN && !slot->request.status;
            uint32_t expected = filled ? slot->request.length + 1 : 1;
            require(written == expected || slot->request.status, "written length %u, expected %u", written, expected);
            complete(load, slot);
            spare[spares++] = slot;
            outstanding--;
        }
        if (load->progress && now_ns() >= report) {
            print("progress=%lu\n", load->completed);
            report = now_ns() + load->progress;
        }
    }
    require(load->queue->used->index == load->queue->avail->index, "used index %u after %u requests: completed twice",
            load->queue->used->index, load->queue->avail->index);
}

/* Do what `run` does without a device: the journal of an earlier boot with the same parameters and depth=1. */
static void run_dry(struct load *load)
{
    while (load->submitted < load->count) {
        struct slot *slot = &load->slots[0];
        prepare(load, slot);
        slot->request.status = BLK_OK;
        if (slot->request.header.type == BLK_OUT)
            load->journal[slot->block] = (struct entry){slot->version, slot->crc};
        if (slot->request.header.type != BLK_FLUSH)
            load->busy[slot->block] = 0;
    }
}

static uint64_t verify(struct load *load)
{
    uint64_t verified = 0;
    uint8_t *data = load->slots[0].request.data;
    for (uint64_t block = 0; block < load->blocks; block++) {
        if (!load->journal[block].version)
            continue;
        uint8_t status = blk_do(load->blk, BLK_IN, (load->first + block) * (load->size / 512), data, load->size);
        require(status == BLK_OK, "verify: block %lu: status 0x%x", load->first + block, status);
        check_block(load, block, data);
        verified++;
    }
    return verified;
}

static void prepare_load(struct load *load, unsigned index, unsigned queues, uint64_t blocks, bool bench)
{
    load->blk = &blk;
    load->queue = &blk.virtio.queues[index];
    load->index = index;
    load->bench = bench;
    load->depth = (unsigned)param_number("depth", 1);
    require(load->depth && load->depth <= 512, "depth=%u is outside 1..512", load->depth);
    load->size = (uint32_t)param_number("bs", 4096);
    load->blocks = blocks / queues;
    require(bench || load->blocks > load->depth, "span: %lu blocks for depth %u", load->blocks, load->depth);
    load->first = param_number("first", 0) + index * load->blocks;
    uint64_t duration = param_number("duration_ms", 0);
    load->count = param_number("count", duration ? ~0ull : 1000);
    load->flush_every = param_number("flush", 0);
    load->seed = param_number("seed", 1);
    load->state = load->seed * 1000003 + index;
    load->progress = index ? 0 : param_number("progress_ms", 0) * 1000000;
    load->gap_limit = ns_to_tsc(param_number("gaps_us", 0) * 1000);
    if (param_number("stoppable", 0)) {
        require(load->first + load->blocks < blk.sectors / (load->size / 512), "the last block is the stop block");
        load->stop_sector = blk.sectors - 1;
    }
    const char *op = param("op", bench ? "randread" : "randwrite");
    load->sequential = !starts(op, "rand");
    op += load->sequential ? 0 : 4;
    load->read_percent = (unsigned)param_number("reads", same(op, "read") ? 100 : 0);
    if (!bench) {
        load->journal = allocate(load->blocks * sizeof *load->journal, 64);
        load->busy = allocate(load->blocks, 64);
    }
    load->slots = allocate(load->depth * sizeof *load->slots, 64);
    for (unsigned i = 0; i < load->depth; i++)
        load->slots[i].request.data = allocate(load->size, PAGE);
}

static void report(const struct load *loads, unsigned queues, uint64_t elapsed)
{
    static struct load total;
    for (unsigned i = 0; i < queues; i++) {
        total.completed += loads[i].completed;
        total.reads += loads[i].reads;
        total.writes += loads[i].writes;
        total.flushes += loads[i].flushes;
        total.errors += loads[i].errors;
        if (loads[i].longest_gap > total.longest_gap)
            total.longest_gap = loads[i].longest_gap;
        stats_merge(&total.stats, &loads[i].stats);
        stats_merge(&total.gaps, &loads[i].gaps);
    }
    uint64_t ns = tsc_to_ns(elapsed), kicks = 0, avoided = 0;
    for (unsigned i = 0; i < queues; i++) {
        kicks += loads[i].queue->kicks;
        avoided += loads[i].queue->kicks_avoided;
    }
    print("requests=%lu\nreads=%lu\nwrites=%lu\nflushes=%lu\nerrors=%lu\n", total.completed, total.reads, total.writes,
          total.flushes, total.errors);
    print("elapsed_us=%lu\niops=%lu\nstall_us=%lu\n", ns / 1000, ns ? total.completed * 1000000000 / ns : 0,
          tsc_to_ns(total.longest_gap) / 1000);
    stats_print(&total.stats, "lat");
    stats_print_all(&total.gaps, "gap");
    print("kicks=%lu\nkicks_avoided=%lu\nirqs=%lu\n", kicks, avoided, device_irqs(&blk.virtio));
    require(blk.virtio.irq == IRQ_POLL || param_is("idle", "spin") || !total.completed || device_irqs(&blk.virtio),
            "%lu requests completed and not one interrupt came", total.completed);
    memset(&total, 0, sizeof total);
}

static void run_load(bool bench, bool dry)
{
    unsigned wanted = (unsigned)param_number("queues", 1);
    if (param_number("smp", 0))
        print("cpus=%u\n", smp_start());
    blk_open(&blk, (unsigned)param_number("disk", 0), wanted);
    unsigned queues = blk.queues < smp_count() ? blk.queues : smp_count();
    uint64_t size = param_number("bs", 4096), span = param_number("span", 16 << 20);
    require(size && size % 512 == 0, "bs=%lu is not a multiple of 512", size);
    if (span > blk.sectors * 512)
        span = blk.sectors * 512;
    struct load *loads = allocate(queues * sizeof *loads, 64);
    for (unsigned i = 0; i < queues; i++)
        prepare_load(&loads[i], i, queues, span / size, bench);
    print("queues=%u\ndepth=%u\nbs=%lu\nspan=%lu\nfeatures=0x%lx\n", queues, loads[0].depth, size, span,
          blk.virtio.features);
    stopped = false;
    uint64_t begin = rdtsc(), duration = param_number("duration_ms", 0);
    for (unsigned i = 0; i < queues; i++)
        loads[i].deadline = duration ? begin + ns_to_tsc(duration * 1000000) : 0;
    for (unsigned i = 1; i < queues && !dry; i++)
        smp_run(i, run, &loads[i]);
    if (dry)
        for (unsigned i = 0; i < queues; i++)
            run_dry(&loads[i]);
    else
        run(&loads[0]);
    for (unsigned i = 1; i < queues && !dry; i++)
        require(smp_wait(i, 60000), "cpu %u: its queue does not finish", i);
    if (!dry)
        report(loads, queues, rdtsc() - begin);
    for (unsigned i = 0; i < queues && !bench; i++)
        print("verified.%u=%lu\n", i, verify(&loads[i]));
}

/* test=blk-write: writes (and `reads=` percent of reads) into a journal, then verify every block of it. */
void test_blk_write(void) { run_load(false, false); }
/* test=blk-verify: verify what blk-write with the same parameters and depth=1 left on the disk. */
void test_blk_verify(void) { run_load(false, true); }
/* test=blk-bench: op=randread|randwrite|read|write, nothing verified. */
void test_blk_bench(void) { run_load(true, false); }
