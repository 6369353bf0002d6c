/* Tests of single block requests: identity, ranges, flush, discard, refusals. */
#include "blk.h"
#include "tests.h"

static struct blk blk;
static uint8_t *data, *copy;

static void open(void)
{
    blk_open(&blk, (unsigned)param_number("disk", 0), 1);
    if (!data) {
        data = allocate(65536, PAGE);
        copy = allocate(65536, PAGE);
    }
}

static void expect(const char *what, uint8_t status, uint8_t expected)
{
    static const char *const names[] = {"ok", "ioerr", "unsupp"};
    print("%s=%s\n", what, status < ARRAY_SIZE(names) ? names[status] : "none");
    require(status == expected, "%s: status 0x%x, expected 0x%x", what, status, expected);
}

/* test=blk-info: capacity, features, configuration, serial. */
void test_blk_info(void)
{
    open();
    char id[21] = {0};
    uint64_t offered = virtio_offered(&blk.virtio);
    print("slot=%u\nsectors=%lu\noffered=0x%lx\nnum_queues=%u\nqueue_size=%u\nread_only=%u\n", blk.virtio.pci->slot,
          blk.sectors, offered, (unsigned)bus_read(blk.virtio.common + C_NUM_QUEUES, 2), blk.virtio.queues[0].size,
          !!(offered & BLK_F_RO));
    print("seg_max=%lu\nblk_size=%lu\n", virtio_config(&blk.virtio, 12, 4), virtio_config(&blk.virtio, 20, 4));
    expect("get_id", blk_do(&blk, BLK_GET_ID, 0, id, 20), BLK_OK);
    print("serial=%s\n", id);
}

static void zeroes(uint32_t type, uint64_t first, const char *name, uint32_t flags, bool must_be_zero)
{
    struct blk_range *range = (void *)copy;
    pattern_fill(data, 65536, first, type, 1);
    expect("write", blk_do(&blk, BLK_OUT, first, data, 65536), BLK_OK);
    *range = (struct blk_range){first + 8, 64, flags};
    expect(name, blk_do(&blk, type, 0, range, sizeof *range), BLK_OK);
    memset(copy, 0xa5, 65536);
    expect("read", blk_do(&blk, BLK_IN, first, copy, 65536), BLK_OK);
    require(!memcmp(data, copy, 8 * 512) && !memcmp(data + 72 * 512, copy + 72 * 512, 65536 - 72 * 512),
            "%s changed its neighbours", name);
    for (unsigned i = 8 * 512; must_be_zero && i < 72 * 512; i++)
        require(!copy[i], "%s: byte %u is 0x%x", name, i, copy[i]);
}

static void bad_range(uint32_t type, const char *name, uint64_t sector, uint32_t sectors, uint32_t flags,
                      uint8_t expected)
{
    struct blk_range *range = (void *)copy;
    *range = (struct blk_range){sector, sectors, flags};
    expect(name, blk_do(&blk, type, 0, range, sizeof *range), expected);
}

static void refusals(void)
{
    expect("read_past_end", blk_do(&blk, BLK_IN, blk.sectors, data, 512), BLK_IOERR);
    expect("read_across_end", blk_do(&blk, BLK_IN, blk.sectors - 1, data, 4096), BLK_IOERR);
    expect("read_wraps", blk_do(&blk, BLK_IN, ~0ull, data, 512), BLK_IOERR);
    expect("read_last", blk_do(&blk, BLK_IN, blk.sectors - 1, data, 512), BLK_OK);
    expect("unknown_type", blk_do(&blk, 99, 0, NULL, 0), BLK_UNSUPP);
}

/* test=blk-ops: every request type, right and wrong. Writes within the last 1 MiB of the disk. */
void test_blk_ops(void)
{
    open();
    uint64_t first = blk.sectors - 2048, offered = virtio_offered(&blk.virtio);
    refusals();
    if (offered & BLK_F_RO) {
        expect("write_read_only", blk_do(&blk, BLK_OUT, first, data, 512), BLK_IOERR);
        return;
    }
    pattern_fill(data, 65536, first, 1, 7);
    expect("write", blk_do(&blk, BLK_OUT, first, data, 65536), BLK_OK);
    expect("write_past_end", blk_do(&blk, BLK_OUT, blk.sectors, data, 512), BLK_IOERR);
    expect("flush", blk_do(&blk, BLK_FLUSH, 0, NULL, 0), BLK_OK);
    expect("read", blk_do(&blk, BLK_IN, first, copy, 65536), BLK_OK);
    require(!memcmp(data, copy, 65536), "read back something else than was written");
    if (offered & BLK_F_WRITE_ZEROES) {
        zeroes(BLK_WRITE_ZEROES, first, "write_zeroes", 0, true);
        zeroes(BLK_WRITE_ZEROES, first, "write_zeroes_unmap", 1, true);
        bad_range(BLK_WRITE_ZEROES, "write_zeroes_past_end", blk.sectors - 1, 8, 0, BLK_IOERR);
        bad_range(BLK_WRITE_ZEROES, "write_zeroes_reserved_flag", first, 8, 2, BLK_UNSUPP);
    }
    if (offered & BLK_F_DISCARD) {
        zeroes(BLK_DISCARD, first, "discard", 0, false);
        bad_range(BLK_DISCARD, "discard_past_end", blk.sectors - 1, 8, 0, BLK_IOERR);
        bad_range(BLK_DISCARD, "discard_unmap_flag", first, 8, 1, BLK_UNSUPP);
    }
}

/* test=blk-boots: count boots in the last sector; end as `end=` says until `boots=` are reached, then power off. */
void test_blk_boots(void)
{
    open();
    uint64_t *words = (void *)data, wanted = param_number("boots", 3);
    expect("read", blk_do(&blk, BLK_IN, blk.sectors - 1, data, 512), BLK_OK);
    if (words[0] != 0x626f6f7473626c6b)
        words[1] = 0;
    words[0] = 0x626f6f7473626c6b;
    print("boot=%lu\n", ++words[1]);
    expect("write", blk_do(&blk, BLK_OUT, blk.sectors - 1, data, 512), BLK_OK);
    if (words[1] < wanted)
        platform_end(param("end", "reset"));
    print("result=ok\n");
    platform_end("off");
}

/* test=blk-capacity: tell capacity and first word, again after every config interrupt until there were `changes=`(1). */
void test_blk_capacity(void)
{
    open();
    uint64_t changes = param_number("changes", 1);
    require(blk.virtio.irq == IRQ_MSIX, "blk-capacity needs irq=msix");
    for (uint64_t told = 0;; told++) {
        blk.sectors = virtio_config(&blk.virtio, 0, 8);
        require(blk_do(&blk, BLK_IN, 0, data, 512) == BLK_OK, "the first sector cannot be read");
        require(blk_do(&blk, BLK_IN, blk.sectors - 1, copy, 512) == BLK_OK, "the last sector cannot be read");
        require(blk_do(&blk, BLK_IN, blk.sectors, copy, 512) == BLK_IOERR, "there is a sector after the last");
        print("capacity=%lu first=0x%lx\n", blk.sectors, *(uint64_t *)data);
        if (told == changes)
            return;
        for (uint64_t seen = irq_total; irq_count[blk.virtio.config_vector] <= told; seen = irq_total)
            halt(seen);
    }
}

/* test=msix: a masked vector leaves its bit in the PBA, unmasking delivers. */
void test_msix(void)
{
    open();
    struct virtio *virtio = &blk.virtio;
    struct queue *queue = &virtio->queues[0];
    require(virtio->irq == IRQ_MSIX, "the device has no MSI-X, or irq= says otherwise");
    uint64_t before = irq_count[queue->vector], deadline;
    msix_set(virtio, 1, queue->vector, lapic_id(), true);
    require(!msix_pending(virtio, 1), "pending before anything happened");
    expect("read_masked", blk_do(&blk, BLK_IN, 0, data, 512), BLK_OK);
    for (deadline = now_ns() + 5000000000; !msix_pending(virtio, 1);)
        require(now_ns() < deadline, "masked vector: the pending bit stays 0");
    require(irq_count[queue->vector] == before, "a masked vector was delivered");
    msix_set(virtio, 1, queue->vector, lapic_id(), false);
    for (deadline = now_ns() + 5000000000; irq_count[queue->vector] == before;)
        require(now_ns() < deadline, "unmasked vector: the pending interrupt was lost");
    require(!msix_pending(virtio, 1), "still pending after delivery");
    print("delivered=%lu\n", irq_count[queue->vector] - before);
    expect("read_unmasked", blk_do(&blk, BLK_IN, 0, data, 512), BLK_OK);
}

static void move_bar(struct virtio *virtio, struct bar *bar, uint64_t to)
{
    struct pci *pci = virtio->pci;
    uint64_t from = bar->address, by = to - from;
    pci_write(pci, PCI_COMMAND, 2, pci->command & ~PCI_COMMAND_MEMORY);
    bar->address = to;
    pci_restore(pci);
    map_range(to, bar->size);
    uint64_t *places[] = {&virtio->common, &virtio->isr, &virtio->config, &virtio->notify, &virtio->msix_table,
                          &virtio->msix_pba, &virtio->queues[0].notify};
    for (unsigned i = 0; i < ARRAY_SIZE(places); i++)
        if (*places[i] >= from && *places[i] < from + bar->size)
            *places[i] += by;
}

/* test=blk-move: the BAR with the doorbells moves there and back under a running queue (MSI-X or polled). */
void test_blk_move(void)
{
    open();
    unsigned moved = 0;
    require(blk.virtio.irq != IRQ_INTX, "blk-move knows no INTx");
    for (unsigned i = 0; i < 6; i++) {
        struct bar *bar = &blk.virtio.pci->bars[i];
        uint64_t home = bar->address;
        if (!bar->size || blk.virtio.notify < home || blk.virtio.notify >= home + bar->size)
            continue;
        for (; moved < 32; moved++) {
            move_bar(&blk.virtio, bar, moved % 2 ? home : 0xd8000000);
            require(blk_do(&blk, BLK_IN, moved, data, 512) == BLK_OK, "request %u after the move failed", moved);
        }
    }
    print("moved_requests=%u\n", moved);
}
