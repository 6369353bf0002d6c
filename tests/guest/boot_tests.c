/* Tests of the platform below PCI: what was handed over at boot, time, interrupts, CPUs. */
#include "pci.h"
#include "tests.h"

/* test=boot: report the hand-over; `ram=` checks the size in bytes, timer interrupts must come. */
void test_boot(void)
{
    uint32_t id[4];
    char vendor[13] = {0};
    cpuid(0, id);
    memcpy(vendor, &id[1], 4);
    memcpy(vendor + 4, &id[3], 4);
    memcpy(vendor + 8, &id[2], 4);
    print("cpu.vendor=%s\ncpu.apic_id=%u\nclock=%s\ntsc_khz=%lu\n", vendor, lapic_id(), clock_source(),
          ns_to_tsc(1000000));
    memory_report();
    print("cmdline=%s\n", boot_cmdline());
    print("acpi.rsdp=0x%lx\nacpi.ecam=0x%lx\nacpi.cpus=%u\nacpi.hw_reduced=%u\nacpi.pm_timer=0x%x\nacpi.tables=",
          acpi.rsdp, acpi.ecam, acpi.cpu_count, acpi.hw_reduced, acpi.pm_timer);
    for (unsigned i = 0; i < acpi.table_count; i++)
        print("%s%s", i ? "," : "", acpi.tables[i]);
    print("\n");
    uint64_t ticks = irq_count[VECTOR_TIMER], deadline = now_ns() + 5000000000;
    while (irq_count[VECTOR_TIMER] < ticks + 2 && now_ns() < deadline)
        halt(irq_total);
    require(irq_count[VECTOR_TIMER] >= ticks + 2, "the local APIC timer does not tick");
    require(!param("ram", NULL) || param_number("ram", 0) == ram_total(), "the memory map has %lu bytes of RAM",
            ram_total());
}

static volatile uint64_t turns[MAX_CPUS];

static void count_turns(void *argument)
{
    for (int i = 0; i < 100000; i++)
        ++*(volatile uint64_t *)argument;
}

/* test=smp: start all CPUs and let each work; `cpus=` checks how many there are. */
void test_smp(void)
{
    unsigned online = smp_start();
    print("cpus_listed=%u\ncpus_online=%u\n", acpi.cpu_count, online);
    require(online == acpi.cpu_count, "%u of %u CPUs came", online, acpi.cpu_count);
    require(param_number("cpus", online) == online, "%u CPUs instead of %lu", online, param_number("cpus", online));
    for (unsigned cpu = 1; cpu < online; cpu++)
        smp_run(cpu, count_turns, (void *)&turns[cpu]);
    for (unsigned cpu = 1; cpu < online; cpu++)
        require(smp_wait(cpu, 30000) && turns[cpu] == 100000, "cpu %u did %lu turns", cpu, turns[cpu]);
}

/* test=pci: list every function with its BARs. */
void test_pci(void)
{
    pci_init();
    for (unsigned i = 0; i < pci_count(); i++) {
        struct pci *pci = pci_at(i);
        print("pci.%u.%u=%x:%x class %x subsystem %x pin %u gsi %u\n", pci->slot, pci->function, pci->vendor,
              pci->device, pci->class, pci->subsystem, pci->interrupt_pin, pci_gsi(pci));
        if (pci->vendor == 0x1af4)
            pci_enable(pci);
        for (unsigned bar = 0; bar < 6; bar++)
            if (pci->bars[bar].size)
                print("pci.%u.%u.bar%u=0x%lx+0x%lx%s%s\n", pci->slot, pci->function, bar, pci->bars[bar].address,
                      pci->bars[bar].size, pci->bars[bar].io ? " io" : "", pci->bars[bar].wide ? " wide" : "");
    }
}
