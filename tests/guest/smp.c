/* Application processors: woken by INIT and SIPI, then each waits for work. */
#include "guest.h"

#define ICR_INIT 0x4500
#define ICR_STARTUP 0x4600
#define ICR_FIXED 0x4000

static struct cpu {
    void (*volatile work)(void *);
    void *volatile argument;
    volatile bool online;
    unsigned apic_id;
} cpus[MAX_CPUS];
static unsigned cpu_total = 1;

extern char trampoline[], trampoline_end[];
extern volatile uint64_t boot_stack, ap_number;
void ap_main(unsigned cpu);

void ap_main(unsigned cpu)
{
    lapic_init();
    cpus[cpu].online = true;
    interrupts_on();
    for (;;) {
        uint64_t seen = irq_total;
        if (cpus[cpu].work) {
            cpus[cpu].work(cpus[cpu].argument);
            barrier();
            cpus[cpu].work = NULL;
        }
        halt(seen);
    }
}

static bool wake(unsigned cpu)
{
    boot_stack = (uint64_t)allocate(65536, 16) + 65536;
    ap_number = cpu;
    ipi_send(cpus[cpu].apic_id, ICR_INIT);
    delay_us(1000);
    for (int attempt = 0; attempt < 2 && !cpus[cpu].online; attempt++) {
        ipi_send(cpus[cpu].apic_id, ICR_STARTUP | TRAMPOLINE >> 12);
        for (int ms = 0; ms < 1000 && !cpus[cpu].online; ms++)
            delay_us(1000);
    }
    return cpus[cpu].online;
}

/* Start every CPU that MADT calls enabled; returns how many run, this one included. */
unsigned smp_start(void)
{
    unsigned me = lapic_id();
    if (cpu_total > 1)
        return cpu_total;
    memcpy((void *)TRAMPOLINE, trampoline, (size_t)(trampoline_end - trampoline));
    for (unsigned i = 0; i < acpi.cpu_count && cpu_total < MAX_CPUS; i++) {
        if (acpi.apic_ids[i] == me)
            continue;
        cpus[cpu_total].apic_id = acpi.apic_ids[i];
        if (!wake(cpu_total))
            break;
        cpu_total++;
    }
    return cpu_total;
}

unsigned smp_count(void) { return cpu_total; }
unsigned smp_apic_id(unsigned cpu) { return cpu ? cpus[cpu].apic_id : lapic_id(); }

void smp_run(unsigned cpu, void (*work)(void *), void *argument)
{
    cpus[cpu].argument = argument;
    cpus[cpu].work = work;
    ipi_send(cpus[cpu].apic_id, ICR_FIXED | VECTOR_IPI);
}

bool smp_wait(unsigned cpu, uint64_t timeout_ms)
{
    uint64_t deadline = now_ns() + timeout_ms * 1000000;
    while (cpus[cpu].work && now_ns() < deadline)
        pause();
    return !cpus[cpu].work;
}
