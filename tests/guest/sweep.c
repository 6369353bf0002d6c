/* Every size and offset of access, with values that mean mischief, to BARs, configuration space and ports. Values
   avoid one thing only: an MSI message with delivery mode SMI or INIT, which a guest would inflict on itself. */
#include "tests.h"
#include "virtio.h"

static const uint64_t values[] = {0, ~0ull, 0x3333333333333333};
static uint64_t accesses;

static void touch(uint64_t address, bool writing)
{
    for (unsigned size = 1; size <= 8; size *= 2) {
        bus_read(address, size);
        accesses++;
        for (unsigned i = 0; writing && i < ARRAY_SIZE(values); i++, accesses++)
            bus_write(address, size, values[i]);
    }
}

/* Whether a page holds the begin of one of the device's structures. */
static bool inhabited(const struct virtio *virtio, uint64_t page)
{
    const uint64_t places[] = {virtio->common, virtio->isr, virtio->config, virtio->notify, virtio->msix_table,
                               virtio->msix_pba};
    for (unsigned i = 0; i < ARRAY_SIZE(places); i++)
        if ((places[i] & ~(PAGE - 1)) == page)
            return true;
    return false;
}

static void sweep_bar(const struct virtio *virtio, const struct bar *bar, uint64_t most, bool writing)
{
    for (uint64_t page = 0; page < bar->size; page += PAGE) {
        uint64_t dense = inhabited(virtio, bar->address + page) ? most : 2;
        uint64_t size = bar->size - page < PAGE ? bar->size - page : PAGE;
        for (uint64_t offset = 0; offset < size; offset++) {
            if (offset == dense && size > dense + 8)
                offset = size - 8;
            touch(bar->address + page + offset, writing);
        }
    }
}

static bool wanted(const struct pci *pci)
{
    return pci->vendor == 0x1af4 && (!param("slot", NULL) || param_number("slot", 0) == pci->slot);
}

/* The virtio device that `pci` is. */
static void find(struct virtio *virtio, const struct pci *pci)
{
    for (unsigned which = 0; virtio_find(virtio, pci->device - 0x1040u, which); which++)
        if (virtio->pci == pci)
            return;
    fail("slot %u is no modern virtio device", pci->slot);
}

/* test=sweep: all BARs of `slot=` (default: every virtio function). Of each page the first 2 bytes, or `dense=` (64)
   where a structure begins, and the last 8, at every offset; `write=0` only reads. Each device is reset after it. */
void test_sweep(void)
{
    struct virtio virtio;
    bool writing = param_number("write", 1);
    pci_init();
    for (unsigned i = 0; i < pci_count(); i++) {
        struct pci *pci = pci_at(i);
        if (!wanted(pci))
            continue;
        uint64_t before = accesses;
        find(&virtio, pci);
        for (unsigned bar = 0; bar < 6; bar++)
            if (pci->bars[bar].size && !pci->bars[bar].io)
                sweep_bar(&virtio, &pci->bars[bar], param_number("dense", 64), writing);
        virtio_reset(&virtio);
        print("sweep.%u=%lu\n", pci->slot, accesses - before);
    }
    require(accesses, "no function to sweep");
}

static void sweep_config(const struct pci *pci, bool ecam, unsigned limit, bool writing)
{
    for (unsigned offset = 0; offset < limit; offset++)
        for (unsigned size = 1; size <= (ecam ? 8u : 4u); size *= 2) {
            if (!ecam && (offset & 3) + size > 4)
                continue;
            pci_raw_read(ecam, pci->slot, pci->function, offset, size);
            accesses++;
            if (!writing)
                continue;
            for (unsigned i = 0; i < ARRAY_SIZE(values); i++, accesses++)
                pci_raw_write(ecam, pci->slot, pci->function, offset, size, values[i]);
            pci_restore(pci);
        }
}

/* test=cfgsweep: configuration space of every virtio function and the host bridge, through both ways. Writes stop at
   0x100; BARs and command are put back after each. Absent slots and odd uses of 0xcf8/0xcfc are read only. */
void test_cfgsweep(void)
{
    bool writing = param_number("write", 1);
    pci_init();
    for (unsigned i = 0; i < pci_count(); i++) {
        struct pci *pci = pci_at(i);
        if (!wanted(pci) && pci->slot)
            continue;
        uint64_t before = accesses, ids = pci_read(pci, 0, 4);
        if (pci->slot)
            pci_enable(pci);
        sweep_config(pci, false, 256, writing && pci->slot);
        if (acpi.ecam) {
            sweep_config(pci, true, 256, writing && pci->slot);
            sweep_config(pci, true, (unsigned)param_number("limit", 4096), false);
        }
        require(pci_read(pci, 0, 4) == ids, "slot %u: its ids changed", pci->slot);
        print("cfgsweep.%u=%lu\n", pci->slot, accesses - before);
    }
    for (unsigned port = 0xcf8; port < 0xcfc; port++)
        for (unsigned size = 1; size <= 4; size *= 2, accesses++)
            port_read((uint16_t)port, size);
    for (unsigned slot = 0; slot < 32; slot++)
        for (unsigned offset = 0; acpi.ecam && offset < 4096; offset += 509, accesses++)
            pci_raw_read(true, slot, 7, offset, 4);
    print("accesses=%lu\n", accesses);
}

/* Ports that end the machine, carry our own output, or reach beyond it (firmware, PCI, DMA). */
static const struct {
    uint16_t from, to;
} dangerous[] = {
    {0x20, 0x21}, {0x60, 0x6f}, {0x80, 0x80}, {0x92, 0x92}, {0xa0, 0xa1}, {0xb2, 0xb3}, {0xe9, 0xe9}, {0xf4, 0xf7},
    {0x3f8, 0x3ff}, {0x402, 0x403}, {0x501, 0x501}, {0x510, 0x51b}, {0x600, 0x6ff}, {0xcf8, 0xcff},
};

static bool skipped(unsigned port, unsigned size)
{
    for (unsigned i = 0; i < ARRAY_SIZE(dangerous); i++)
        if (port + size - 1 >= dangerous[i].from && port <= dangerous[i].to)
            return true;
    return false;
}

/* test=portsweep: `from=`..`to=` by `step=`; all sizes read, and with write=1 written. `all=1` reads the
   dangerous ones too. */
void test_portsweep(void)
{
    uint64_t from = param_number("from", 0), to = param_number("to", 0xffff), step = param_number("step", 1);
    uint64_t answering = 0;
    bool writing = param_number("write", 0), all = param_number("all", 0);
    require(step, "step=0");
    for (uint64_t port = from; port <= to; port += step)
        for (unsigned size = 1; size <= 4; size *= 2) {
            if (skipped((unsigned)port, size) && !(all && !writing))
                continue;
            uint32_t value = port_read((uint16_t)port, size);
            answering += size == 1 && value != 0xff;
            accesses++;
            for (unsigned i = 0; writing && i < ARRAY_SIZE(values); i++, accesses++)
                port_write((uint16_t)port, size, (uint32_t)values[i]);
        }
    print("accesses=%lu\nports_answering=%lu\n", accesses, answering);
}
