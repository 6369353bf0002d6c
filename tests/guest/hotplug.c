/* test=hotplug: what an operating system does about ACPI PCI hotplug, on the registers that the AML would use.

   insertions=N removals=N   end after so many of both (0 1)
   drive=0                   leave new disks alone; else write, read back and compare
   load=1                    keep writing to every new disk until it is asked for
   errors=1                  with load=1: a write that fails is counted, and ends the load on that disk
   refuse=N                  answer the first N requests to eject with _OST "busy"
   deaf=1                    never look at the registers
   unasked=SLOT              eject a slot that nobody asked for, first of all
   delay=MS                  begin to listen late, as a slow boot does */
#include "blk.h"
#include "tests.h"

#define GED 0xfed00000
#define PCI_UP 0xfed01000
#define PCI_DOWN 0xfed01004
#define PCI_EJECT 0xfed01008
#define OST_SLOT 0xfed01010
#define OST_EVENT 0xfed01014
#define OST_STATUS 0xfed01018
#define GSI_GED 13
#define NOTIFY_CHECK 1
#define NOTIFY_EJECT 3
#define OST_BUSY 0x82

static struct blk disks[32];
static bool driven[32], loaded[32];
static uint8_t *data, *copy;
static uint64_t insertions, removals, refusals, written;
static uint32_t early;                                  /* slots whose insertion was read before its turn */

static void answer(unsigned slot, unsigned event, unsigned status)
{
    bus_write(OST_SLOT, 4, slot);
    bus_write(OST_EVENT, 4, event);
    bus_write(OST_STATUS, 4, status);
}

/* virtio_find() wants the number of a disk among disks. */
static unsigned number_of(const struct pci *pci)
{
    unsigned which = 0;
    for (unsigned i = 0; pci_at(i) != pci; i++)
        which += pci_at(i)->vendor == pci->vendor && pci_at(i)->device == pci->device;
    return which;
}

static void drive(struct pci *pci)
{
    struct blk *blk = &disks[pci->slot];
    memset(blk, 0, sizeof *blk);
    blk_open(blk, number_of(pci), 1);
    driven[pci->slot] = loaded[pci->slot] = true;
    require(blk_do(blk, BLK_IN, 0, copy, 4096) == BLK_OK, "slot %u: the first block cannot be read", pci->slot);
    if (!(virtio_offered(&blk->virtio) & BLK_F_RO)) {
        pattern_fill(data, 4096, 8, insertions, 1);
        require(blk_do(blk, BLK_OUT, 8, data, 4096) == BLK_OK, "slot %u: cannot be written", pci->slot);
        require(blk_do(blk, BLK_IN, 8, copy, 4096) == BLK_OK, "slot %u: cannot be read", pci->slot);
        require(!memcmp(data, copy, 4096), "slot %u: reads something else than was written", pci->slot);
    }
}

static void inserted(unsigned slot)
{
    struct pci *pci = pci_probe(slot);
    if (!pci) {
        print("in.%u=nobody\n", slot);
        return;
    }
    insertions++;
    print("in.%u=%x:%x\n", slot, pci->vendor, pci->device);
    answer(slot, NOTIFY_CHECK, 0);
    if (pci->vendor == 0x1af4 && pci->device == 0x1042 && param_number("drive", 1))
        drive(pci);
}

static void asked_for(unsigned slot)
{
    if (refusals < param_number("refuse", 0)) {
        refusals++;
        print("refused.%u=%lu\n", slot, refusals);
        answer(slot, NOTIFY_EJECT, OST_BUSY);
        return;
    }
    if (driven[slot])
        virtio_reset(&disks[slot].virtio);
    driven[slot] = false;
    bus_write(PCI_EJECT, 4, 1u << slot);
    if (pci_probe(slot)) {                              /* the next one may be in it already, and is announced then */
        early |= (uint32_t)bus_read(PCI_UP, 4);
        require(early >> slot & 1, "slot %u: still there after its ejection", slot);
    }
    answer(slot, NOTIFY_EJECT, 0);                      /* as Linux does it: too late to matter */
    removals++;
    print("out.%u=%lu\n", slot, removals);
}

static void eject_unasked(unsigned slot)
{
    bus_write(PCI_EJECT, 4, 1u << slot);
    require(pci_probe(slot), "slot %u: ejected although nobody asked for it", slot);
    print("unasked.up=0x%lx\n", bus_read(PCI_UP, 4));
}

static void keep_busy(void)
{
    for (unsigned slot = 0; slot < 32; slot++)
        if (driven[slot] && loaded[slot]) {
            loaded[slot] = blk_do(&disks[slot], BLK_OUT, 8 * (written % 64), data, 4096) == BLK_OK;
            require(loaded[slot] || param_number("errors", 0), "slot %u: a write failed", slot);
            if (!loaded[slot])
                print("failed.%u=%lu\n", slot, written);
            written++;
        }
}

void test_hotplug(void)
{
    data = allocate(4096, PAGE);
    copy = allocate(4096, PAGE);
    pci_init();
    map_range(GED, 0x2000);
    if (param("unasked", NULL))
        eject_unasked((unsigned)param_number("unasked", 0));
    print("listening=%u\n", 1);
    while (param_number("deaf", 0))
        halt(irq_total);
    delay_us(param_number("delay", 0) * 1000);
    intx_attach(GSI_GED, (volatile uint8_t *)GED);      /* the handler's read takes the event and lowers the line */
    while (insertions < param_number("insertions", 0) || removals < param_number("removals", 1)) {
        uint64_t seen = irq_total;
        uint32_t up = early | (uint32_t)bus_read(PCI_UP, 4), down = (uint32_t)bus_read(PCI_DOWN, 4);
        early = 0;
        for (unsigned slot = 0; slot < 32; slot++) {
            if (up >> slot & 1)
                inserted(slot);
            if (down >> slot & 1)
                asked_for(slot);
        }
        if (param_number("load", 0))
            keep_busy();
        else if (!up && !down)
            halt(seen);
    }
    print("insertions=%lu\nremovals=%lu\nwritten=%lu\n", insertions, removals, written);
}
