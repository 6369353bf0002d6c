/* virtio-pci modern transport: capabilities, features, queues, MSI-X or INTx. */
#include "virtio.h"

#define CAP_COMMON 1
#define CAP_NOTIFY 2
#define CAP_ISR 3
#define CAP_DEVICE 4

static void read_capability(struct virtio *device, unsigned at)
{
    const struct pci *pci = device->pci;
    unsigned type = (unsigned)pci_read(pci, at + 3, 1), bar = (unsigned)pci_read(pci, at + 4, 1);
    uint32_t offset = (uint32_t)pci_read(pci, at + 8, 4), size = (uint32_t)pci_read(pci, at + 12, 4);
    if (type < CAP_COMMON || type > CAP_DEVICE)
        return;
    require(bar < 6 && pci->bars[bar].size && !pci->bars[bar].io, "slot %u: capability %u names bar %u", pci->slot,
            type, bar);
    require((uint64_t)offset + size <= pci->bars[bar].size, "slot %u: capability %u ends outside its bar", pci->slot,
            type);
    uint64_t address = pci->bars[bar].address + offset;
    if (type == CAP_COMMON && !device->common)
        device->common = address, device->common_size = size;
    if (type == CAP_ISR && !device->isr)
        device->isr = address, device->isr_size = size;
    if (type == CAP_DEVICE && !device->config)
        device->config = address, device->config_size = size;
    if (type == CAP_NOTIFY && !device->notify) {
        device->notify = address, device->notify_size = size;
        device->notify_multiplier = (uint32_t)pci_read(pci, at + 16, 4);
    }
}

static void read_msix(struct virtio *device)
{
    const struct pci *pci = device->pci;
    unsigned at = pci_capability(pci, PCI_CAP_MSIX, 0);
    if (!at)
        return;
    uint32_t table = (uint32_t)pci_read(pci, at + 4, 4), pba = (uint32_t)pci_read(pci, at + 8, 4);
    device->msix_size = ((unsigned)pci_read(pci, at + 2, 2) & 0x7ff) + 1;
    device->msix_table = pci->bars[table & 7].address + (table & ~7u);
    device->msix_pba = pci->bars[pba & 7].address + (pba & ~7u);
}

bool virtio_find(struct virtio *device, unsigned type, unsigned which)
{
    pci_init();
    for (unsigned i = 0; i < pci_count(); i++) {
        struct pci *pci = pci_at(i);
        if (pci->vendor != 0x1af4 || pci->device != 0x1040 + type || which--)
            continue;
        memset(device, 0, sizeof *device);
        device->pci = pci;
        device->type = type;
        pci_enable(pci);
        for (unsigned at = pci_capability(pci, PCI_CAP_VENDOR, 0); at; at = pci_capability(pci, PCI_CAP_VENDOR, at))
            read_capability(device, at);
        require(device->common && device->notify && device->isr, "slot %u lacks a virtio capability", pci->slot);
        read_msix(device);
        device->irq = param_is("irq", "intx") || !device->msix_size ? IRQ_INTX : IRQ_MSIX;
        if (param_is("irq", "poll"))
            device->irq = IRQ_POLL;
        return true;
    }
    return false;
}

uint8_t virtio_status(const struct virtio *device) { return (uint8_t)bus_read(device->common + C_STATUS, 1); }

uint64_t virtio_config(const struct virtio *device, unsigned offset, unsigned size)
{
    return bus_read(device->config + offset, size);
}

void virtio_reset(struct virtio *device)
{
    uint64_t deadline = now_ns() + 10000000000;
    bus_write(device->common + C_STATUS, 1, 0);
    while (virtio_status(device)) {
        require(now_ns() < deadline, "slot %u: reset not finished in 10 s", device->pci->slot);
        delay_us(200);
    }
}

uint64_t virtio_offered(struct virtio *device)
{
    bus_write(device->common + C_DEVICE_FEATURE_SELECT, 4, 0);
    uint64_t offered = bus_read(device->common + C_DEVICE_FEATURE, 4);
    bus_write(device->common + C_DEVICE_FEATURE_SELECT, 4, 1);
    return offered | bus_read(device->common + C_DEVICE_FEATURE, 4) << 32;
}

void virtio_negotiate(struct virtio *device, uint64_t wanted)
{
    virtio_reset(device);
    bus_write(device->common + C_STATUS, 1, STATUS_ACKNOWLEDGE);
    bus_write(device->common + C_STATUS, 1, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    uint64_t offered = virtio_offered(device);
    require(offered & F_VERSION_1, "slot %u does not offer VERSION_1", device->pci->slot);
    wanted |= F_VERSION_1;
    if (param_number("indirect", 1))
        wanted |= F_INDIRECT;
    if (param_number("event_idx", 1))
        wanted |= F_EVENT_IDX;
    device->features = wanted & offered;
    bus_write(device->common + C_DRIVER_FEATURE_SELECT, 4, 0);
    bus_write(device->common + C_DRIVER_FEATURE, 4, device->features);
    bus_write(device->common + C_DRIVER_FEATURE_SELECT, 4, 1);
    bus_write(device->common + C_DRIVER_FEATURE, 4, device->features >> 32);
    bus_write(device->common + C_STATUS, 1, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
    require(virtio_status(device) & STATUS_FEATURES_OK, "slot %u refused features 0x%lx", device->pci->slot,
            device->features);
}

void msix_set(struct virtio *device, unsigned entry, unsigned vector, unsigned apic_id, bool masked)
{
    uint64_t at = device->msix_table + entry * 16;
    bus_write(at, 4, 0xfee00000 | apic_id << 12);
    bus_write(at + 4, 4, 0);
    bus_write(at + 8, 4, vector);
    bus_write(at + 12, 4, masked);
}

bool msix_pending(const struct virtio *device, unsigned entry)
{
    return bus_read(device->msix_pba + entry / 64 * 8, 8) >> entry % 64 & 1;
}

static void setup_interrupts(struct virtio *device)
{
    struct pci *pci = device->pci;
    unsigned at = pci_capability(pci, PCI_CAP_MSIX, 0);
    if (at)
        pci_write(pci, at + 2, 2, device->irq == IRQ_MSIX ? 0x8000 : 0);
    pci->command &= (uint16_t)~PCI_COMMAND_NO_INTX;
    if (device->irq != IRQ_INTX)
        pci->command |= PCI_COMMAND_NO_INTX;
    pci_write(pci, PCI_COMMAND, 2, pci->command);
    if (device->config_vector)
        return;                                         /* a second set-up keeps its vectors */
    if (device->irq == IRQ_INTX)
        device->config_vector = intx_attach(pci_gsi(pci), (volatile uint8_t *)device->isr);
    else if (device->irq == IRQ_MSIX)
        device->config_vector = vector_allocate();
}

static void setup_queue(struct virtio *device, unsigned index, unsigned size)
{
    uint64_t common = device->common;
    struct queue *queue = &device->queues[index];
    bus_write(common + C_QUEUE_SELECT, 2, index);
    unsigned largest = (unsigned)bus_read(common + C_QUEUE_SIZE, 2);
    require(largest && !(largest & (largest - 1)), "slot %u queue %u: size %u", device->pci->slot, index, largest);
    if (!size || size > largest)
        size = largest;
    bus_write(common + C_QUEUE_SIZE, 2, size);
    unsigned vector = queue->vector, cpu = device->irq == IRQ_MSIX ? index % smp_count() : 0;
    queue_allocate(queue, device, index, size);
    queue->notify = device->notify + bus_read(common + C_NOTIFY_OFF, 2) * device->notify_multiplier;
    bus_write(common + C_DESC, 4, (uint32_t)(uint64_t)queue->desc);
    bus_write(common + C_DESC + 4, 4, (uint64_t)queue->desc >> 32);
    bus_write(common + C_DRIVER, 4, (uint32_t)(uint64_t)queue->avail);
    bus_write(common + C_DRIVER + 4, 4, (uint64_t)queue->avail >> 32);
    bus_write(common + C_DEVICE, 4, (uint32_t)(uint64_t)queue->used);
    bus_write(common + C_DEVICE + 4, 4, (uint64_t)queue->used >> 32);
    if (device->irq == IRQ_MSIX) {
        unsigned entry = index + 1 < device->msix_size ? index + 1 : device->msix_size - 1;
        queue->vector = vector ? vector : vector_allocate();
        msix_set(device, entry, queue->vector, smp_apic_id(cpu), false);
        bus_write(common + C_QUEUE_VECTOR, 2, entry);
        require(bus_read(common + C_QUEUE_VECTOR, 2) == entry, "slot %u queue %u: no vector", device->pci->slot, index);
    } else {
        queue->vector = device->config_vector;
    }
    bus_write(common + C_QUEUE_ENABLE, 2, 1);
}

void virtio_queues(struct virtio *device, unsigned wanted, unsigned size)
{
    unsigned offered = (unsigned)bus_read(device->common + C_NUM_QUEUES, 2);
    require(wanted <= offered, "slot %u has %u queues, %u wanted", device->pci->slot, offered, wanted);
    setup_interrupts(device);
    if (device->irq == IRQ_MSIX) {
        msix_set(device, 0, device->config_vector, lapic_id(), false);
        bus_write(device->common + C_CONFIG_VECTOR, 2, 0);
    }
    if (!device->queues)
        device->queues = allocate(MAX_QUEUES * sizeof *device->queues, 64);
    device->queue_count = wanted;
    for (unsigned i = 0; i < wanted; i++)
        setup_queue(device, i, size);
}

void virtio_ready(struct virtio *device)
{
    bus_write(device->common + C_STATUS, 1,
              STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
    uint8_t status = virtio_status(device);
    require(status == 15, "slot %u: status 0x%x after DRIVER_OK", device->pci->slot, status);
}

uint64_t device_irqs(const struct virtio *device)
{
    uint64_t total = 0;
    if (device->irq == IRQ_INTX)
        return irq_count[device->config_vector];
    for (unsigned i = 0; i < device->queue_count && device->irq == IRQ_MSIX; i++)
        total += irq_count[device->queues[i].vector];
    return total;
}
