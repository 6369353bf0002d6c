/* PCI functions of bus 0, reached through 0xcf8/0xcfc or ECAM (`pci=ecam`). */
#ifndef GUEST_PCI_H
#define GUEST_PCI_H
#include "guest.h"

#define PCI_COMMAND 0x04
#define PCI_COMMAND_IO 1
#define PCI_COMMAND_MEMORY 2
#define PCI_COMMAND_MASTER 4
#define PCI_COMMAND_NO_INTX 0x400
#define PCI_STATUS_CAPABILITIES 0x10
#define PCI_CAP_VENDOR 0x09
#define PCI_CAP_MSIX 0x11

struct pci {
    uint8_t slot, function, interrupt_line, interrupt_pin;
    uint16_t vendor, device, subsystem, command;
    uint32_t class;
    struct bar {
        uint64_t address, size;     /* size 0: not implemented, or the upper half of a 64-bit BAR */
        bool io, wide;
    } bars[6];
};

void pci_init(void);
unsigned pci_count(void);
struct pci *pci_at(unsigned index);
struct pci *pci_find(unsigned slot);
/* Look at function 0 of a slot again, as after hotplug; NULL if nobody is there (any more). */
struct pci *pci_probe(unsigned slot);
/* `size` 1, 2 or 4 (8 with ECAM only). */
uint64_t pci_read(const struct pci *pci, unsigned offset, unsigned size);
void pci_write(const struct pci *pci, unsigned offset, unsigned size, uint64_t value);
uint64_t pci_raw_read(bool ecam, unsigned slot, unsigned function, unsigned offset, unsigned size);
void pci_raw_write(bool ecam, unsigned slot, unsigned function, unsigned offset, unsigned size, uint64_t value);
/* The offset of the next capability with this id after `from` (0: the first), or 0. */
unsigned pci_capability(const struct pci *pci, unsigned id, unsigned from);
/* Measure the BARs, place those without an address, turn decoding on. */
void pci_enable(struct pci *pci);
void pci_restore(const struct pci *pci);
unsigned pci_gsi(const struct pci *pci);

#endif
