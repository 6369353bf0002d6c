/* PCI: scan, configuration access, BAR measurement and, where no firmware did it, placement. */
#include "pci.h"

#define CONFIG_ADDRESS 0xcf8
#define CONFIG_DATA 0xcfc
#define HOST_BRIDGE_OWN 0x0d578086          /* with this bridge slot s, pin A is GSI 5 + s % 8 */
#define HOST_BRIDGE_Q35 0x29c08086          /* with this one it is GSI 20 + s % 4, whatever the line register says */

static struct pci functions[64];
static unsigned count;
static bool use_ecam;
static uint64_t next_memory = 0xd0000000, next_port = 0xc000;

static uint64_t ecam_address(unsigned slot, unsigned function, unsigned offset)
{
    return acpi.ecam + (slot << 15 | function << 12 | offset);
}

uint64_t pci_raw_read(bool ecam, unsigned slot, unsigned function, unsigned offset, unsigned size)
{
    if (ecam)
        return bus_read(ecam_address(slot, function, offset), size);
    out32(CONFIG_ADDRESS, 1u << 31 | slot << 11 | function << 8 | (offset & 0xfc));
    return port_read((uint16_t)(CONFIG_DATA + (offset & 3)), size);
}

void pci_raw_write(bool ecam, unsigned slot, unsigned function, unsigned offset, unsigned size, uint64_t value)
{
    if (ecam) {
        bus_write(ecam_address(slot, function, offset), size, value);
        return;
    }
    out32(CONFIG_ADDRESS, 1u << 31 | slot << 11 | function << 8 | (offset & 0xfc));
    port_write((uint16_t)(CONFIG_DATA + (offset & 3)), size, (uint32_t)value);
}

uint64_t pci_read(const struct pci *pci, unsigned offset, unsigned size)
{
    return pci_raw_read(use_ecam, pci->slot, pci->function, offset, size);
}

void pci_write(const struct pci *pci, unsigned offset, unsigned size, uint64_t value)
{
    pci_raw_write(use_ecam, pci->slot, pci->function, offset, size, value);
}

static void read_ids(struct pci *pci, unsigned slot, unsigned function, uint32_t ids)
{
    memset(pci, 0, sizeof *pci);
    pci->slot = (uint8_t)slot;
    pci->function = (uint8_t)function;
    pci->vendor = (uint16_t)ids;
    pci->device = (uint16_t)(ids >> 16);
    pci->class = (uint32_t)pci_read(pci, 8, 4) >> 8;
    pci->subsystem = (uint16_t)pci_read(pci, 0x2e, 2);
    pci->interrupt_line = (uint8_t)pci_read(pci, 0x3c, 1);
    pci->interrupt_pin = (uint8_t)pci_read(pci, 0x3d, 1);
    pci->command = (uint16_t)pci_read(pci, PCI_COMMAND, 2);
}

void pci_init(void)
{
    if (count)
        return;
    use_ecam = param_is("pci", "ecam");
    require(!use_ecam || acpi.ecam, "pci=ecam but ACPI has no MCFG");
    for (unsigned slot = 0; slot < 32; slot++)
        for (unsigned function = 0; function < 8 && count < ARRAY_SIZE(functions); function++) {
            uint32_t ids = (uint32_t)pci_raw_read(use_ecam, slot, function, 0, 4);
            if (ids != 0xffffffff)
                read_ids(&functions[count++], slot, function, ids);
            if (!function && (ids == 0xffffffff || !(pci_raw_read(use_ecam, slot, 0, 0x0e, 1) & 0x80)))
                break;
        }
}

unsigned pci_count(void) { return count; }
struct pci *pci_at(unsigned index) { return &functions[index]; }

struct pci *pci_find(unsigned slot)
{
    for (unsigned i = 0; i < count; i++)
        if (functions[i].slot == slot && functions[i].vendor != 0xffff)
            return &functions[i];
    return NULL;
}

struct pci *pci_probe(unsigned slot)
{
    struct pci *pci = NULL;
    pci_init();
    for (unsigned i = 0; i < count && !pci; i++)
        if (functions[i].slot == slot)
            pci = &functions[i];                        /* whoever was here, devices point to this place */
    uint32_t ids = (uint32_t)pci_raw_read(use_ecam, slot, 0, 0, 4);
    if (ids == 0xffffffff) {
        if (pci)
            pci->vendor = pci->device = 0xffff;
        return NULL;
    }
    require(pci || count < ARRAY_SIZE(functions), "no room for another function");
    if (!pci)
        pci = &functions[count++];
    read_ids(pci, slot, 0, ids);
    return pci;
}

unsigned pci_capability(const struct pci *pci, unsigned id, unsigned from)
{
    if (!(pci_read(pci, 6, 2) & PCI_STATUS_CAPABILITIES))
        return 0;
    unsigned at = (unsigned)pci_read(pci, from ? from + 1 : 0x34, 1) & 0xfc;
    for (int limit = 48; at >= 0x40 && limit; limit--) {
        uint32_t header = (uint32_t)pci_read(pci, at, 2);
        if ((header & 0xff) == id)
            return at;
        at = header >> 8 & 0xfc;
    }
    return 0;
}

static uint64_t place(const struct bar *bar)
{
    uint64_t *next = bar->io ? &next_port : &next_memory;
    uint64_t address = (*next + bar->size - 1) & ~(bar->size - 1);
    *next = address + bar->size;
    require(address + bar->size <= (bar->io ? 0x10000 : 0xfec00000), "no room for a BAR of %lu bytes", bar->size);
    return address;
}

static void measure(struct pci *pci, unsigned index)
{
    unsigned offset = 0x10 + index * 4;
    uint32_t low = (uint32_t)pci_read(pci, offset, 4), high = 0;
    struct bar *bar = &pci->bars[index];
    bar->io = low & 1;
    bar->wide = !bar->io && (low & 6) == 4 && index < 5;
    pci_write(pci, offset, 4, 0xffffffff);
    uint64_t mask = (uint32_t)pci_read(pci, offset, 4) & (bar->io ? ~3u : ~15u);
    pci_write(pci, offset, 4, low);
    if (bar->wide) {
        high = (uint32_t)pci_read(pci, offset + 4, 4);
        pci_write(pci, offset + 4, 4, 0xffffffff);
        mask |= pci_read(pci, offset + 4, 4) << 32;
        pci_write(pci, offset + 4, 4, high);
    } else if (mask) {
        mask |= bar->io ? 0xffffffffffff0000 : 0xffffffff00000000;
    }
    bar->size = mask ? ~mask + 1 : 0;
    bar->address = ((uint64_t)high << 32 | low) & (bar->io ? ~3ull : ~15ull);
    require(!(bar->size & (bar->size - 1)), "%u.%u bar %u: size mask 0x%lx", pci->slot, pci->function, index, mask);
    if (bar->size && !bar->address)
        bar->address = place(bar);
    if (bar->size && !bar->io)
        map_range(bar->address, bar->size);
}

void pci_restore(const struct pci *pci)
{
    for (unsigned i = 0; i < 6; i++) {
        const struct bar *bar = &pci->bars[i];
        if (!bar->size)
            continue;
        pci_write(pci, 0x10 + i * 4, 4, (uint32_t)bar->address);
        if (bar->wide)
            pci_write(pci, 0x14 + i * 4, 4, bar->address >> 32);
    }
    pci_write(pci, PCI_COMMAND, 2, pci->command);
}

void pci_enable(struct pci *pci)
{
    pci_write(pci, PCI_COMMAND, 2, pci->command & ~(PCI_COMMAND_IO | PCI_COMMAND_MEMORY));
    for (unsigned i = 0; i < 6; i += 1 + pci->bars[i].wide)
        measure(pci, i);
    pci->command |= PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER;
    pci_restore(pci);
}

unsigned pci_gsi(const struct pci *pci)
{
    if (param("gsi", NULL))
        return (unsigned)param_number("gsi", 0);
    uint32_t bridge = (uint32_t)pci_raw_read(use_ecam, 0, 0, 0, 4);
    if (bridge == HOST_BRIDGE_OWN)
        return 5 + pci->slot % 8;
    return bridge == HOST_BRIDGE_Q35 ? 20 + pci->slot % 4 : pci->interrupt_line;
}
