/* The few facts the guest takes from ACPI: how to end, where ECAM and the APICs are, which CPUs exist. */
#include "guest.h"

struct acpi acpi = {.lapic = 0xfee00000, .ioapic = 0xfec00000};

static uint64_t get(uint64_t address, unsigned size)
{
    uint64_t value = 0;
    memcpy(&value, (void *)address, size);
    return value;
}

static bool sums_to_zero(uint64_t address, uint64_t size)
{
    uint8_t sum = 0;
    for (uint64_t i = 0; i < size; i++)
        sum = (uint8_t)(sum + *(uint8_t *)(address + i));
    return !sum;
}

static void read_fadt(uint64_t table, uint64_t length)
{
    acpi.pm_timer = (uint16_t)get(table + 76, 4);
    acpi.pm1a_control = (uint16_t)get(table + 64, 4);
    uint32_t flags = (uint32_t)get(table + 112, 4);
    if (flags & 1 << 10) {
        acpi.reset_port = (uint16_t)get(table + 120, 8);
        acpi.reset_value = (uint8_t)get(table + 128, 1);
    }
    acpi.hw_reduced = flags & 1 << 20;
    if (length >= 220 && get(table + 212, 8))
        acpi.pm_timer = (uint16_t)get(table + 212, 8);
    if (length >= 256)
        acpi.sleep_port = (uint16_t)get(table + 248, 8);
}

static void read_madt(uint64_t table, uint64_t length)
{
    acpi.lapic = get(table + 36, 4);
    for (uint64_t at = table + 44; at + 2 <= table + length;) {
        unsigned type = (unsigned)get(at, 1), size = (unsigned)get(at + 1, 1);
        bool x2 = type == 9;
        if (type == 1)
            acpi.ioapic = get(at + 4, 4);
        if ((x2 ? get(at + 8, 4) & 1 : type == 0 && (get(at + 4, 4) & 1)) && acpi.cpu_count < MAX_CPUS)
            acpi.apic_ids[acpi.cpu_count++] = (uint32_t)(x2 ? get(at + 4, 4) : get(at + 3, 1));
        if (size < 2)
            break;
        at += size;
    }
}

static void read_table(uint64_t table)
{
    map_range(table, PAGE);
    uint64_t length = get(table + 4, 4);
    map_range(table, length);
    if (acpi.table_count < ARRAY_SIZE(acpi.tables))
        memcpy(acpi.tables[acpi.table_count++], (void *)table, 4);
    require(sums_to_zero(table, length), "acpi: checksum of the table at 0x%lx", table);
    if (!memcmp((void *)table, "FACP", 4))
        read_fadt(table, length);
    else if (!memcmp((void *)table, "APIC", 4))
        read_madt(table, length);
    else if (!memcmp((void *)table, "MCFG", 4) && length >= 60)
        acpi.ecam = get(table + 44, 8);
}

void acpi_init(void)
{
    uint64_t rsdp = acpi.rsdp = boot_rsdp();
    if (!rsdp || memcmp((void *)rsdp, "RSD PTR ", 8))
        return;
    bool extended = get(rsdp + 15, 1) >= 2 && get(rsdp + 24, 8);
    require(sums_to_zero(rsdp, 20), "acpi: checksum of the RSDP at 0x%lx", rsdp);
    require(!extended || sums_to_zero(rsdp, get(rsdp + 20, 4)), "acpi: extended checksum of the RSDP at 0x%lx", rsdp);
    uint64_t root = extended ? get(rsdp + 24, 8) : get(rsdp + 16, 4);
    unsigned width = extended ? 8 : 4;
    map_range(root, PAGE);
    uint64_t length = get(root + 4, 4);
    map_range(root, length);
    require(sums_to_zero(root, length), "acpi: checksum of the root table at 0x%lx", root);
    for (uint64_t at = root + 36; at + width <= root + length; at += width)
        read_table(get(at, width));
}
