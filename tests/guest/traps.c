/* The IDT, the local APIC and the IOAPIC, all set up from ring 3. */
#include "guest.h"

#define LAPIC 0xfee00000ull
#define LAPIC_ID 0x20
#define LAPIC_TPR 0x80
#define LAPIC_SVR 0xf0
#define LAPIC_ICR 0x300
#define LAPIC_TIMER 0x320
#define LAPIC_LINT0 0x350
#define LAPIC_COUNT 0x380
#define LAPIC_DIVIDE 0x3e0
#define MASKED 0x10000
#define LEVEL 0x8000

extern uint64_t idt[512];
extern char interrupt_stubs[], intx_stubs[], exception_stubs[], service_entry[];
void exception_report(void);

volatile uint64_t irq_count[256];
volatile uint64_t irq_total;
volatile uint64_t exception[6];
volatile uint64_t intx_isr[INTX_LINES * INTX_SHARERS];
volatile uint8_t intx_seen[INTX_LINES];
static unsigned intx_gsi[INTX_LINES];
static unsigned next_vector = VECTOR_MSI;

static void set_gate(unsigned vector, const char *entry, unsigned privilege)
{
    uint64_t address = (uint64_t)entry;
    idt[vector * 2 + 1] = address >> 32;
    idt[vector * 2] = (address & 0xffff) | KERNEL_CS << 16 | (0x8eull | privilege << 5) << 40
                      | (address >> 16 & 0xffff) << 48;
}

void traps_init(void)
{
    for (unsigned vector = 0; vector < 32; vector++)
        set_gate(vector, exception_stubs + vector * 32, vector == 4 ? 3 : 0);
    for (unsigned vector = 0x20; vector < VECTOR_INTX; vector++)
        set_gate(vector, interrupt_stubs + (vector - 0x20) * 32, 0);
    for (unsigned line = 0; line < INTX_LINES; line++)
        set_gate(VECTOR_INTX + line, intx_stubs + line * 32, 0);
    for (unsigned vector = VECTOR_INTX + INTX_LINES; vector < 256; vector++)
        set_gate(vector, interrupt_stubs + (VECTOR_SPURIOUS - 0x20) * 32, 0);
    set_gate(3, service_entry, 3);
}

/* Reached by iretq from an exception: exception[] holds vector, error code, rip, cs, rsp, cr2. */
void exception_report(void)
{
    fail("exception %lu error 0x%lx at 0x%lx cs 0x%lx rsp 0x%lx cr2 0x%lx", exception[0], exception[1], exception[2],
         exception[3], exception[4], exception[5]);
}

static void lapic_write(unsigned reg, uint32_t value) { bus_write(LAPIC + reg, 4, value); }
unsigned lapic_id(void) { return (unsigned)bus_read(LAPIC + LAPIC_ID, 4) >> 24; }

void lapic_init(void)
{
    lapic_write(LAPIC_LINT0, MASKED);               /* firmware may have left the 8259 wired to it */
    lapic_write(LAPIC_TPR, 0);
    lapic_write(LAPIC_SVR, 0x100 | VECTOR_SPURIOUS);
}

void timer_start(unsigned hz)
{
    lapic_write(LAPIC_DIVIDE, 0xa);                 /* bus clock / 128; KVM's and QEMU's bus runs at 1 GHz */
    lapic_write(LAPIC_TIMER, 0x20000 | VECTOR_TIMER);
    lapic_write(LAPIC_COUNT, 1000000000 / 128 / hz);
}

void ipi_send(unsigned apic_id, uint32_t command)
{
    lapic_write(LAPIC_ICR + 0x10, apic_id << 24);
    lapic_write(LAPIC_ICR, command);
}

unsigned vector_allocate(void)
{
    require(next_vector < VECTOR_MSI_END, "out of interrupt vectors");
    return next_vector++;
}

void interrupts_on(void) { service(SERVICE_STI, 0, 0); }
void interrupts_off(void) { service(SERVICE_CLI, 0, 0); }
void halt(uint64_t seen) { service(SERVICE_HALT, seen, 0); }

static void ioapic_write(unsigned reg, uint32_t value)
{
    bus_write(acpi.ioapic, 4, reg);
    bus_write(acpi.ioapic + 0x10, 4, value);
}

unsigned intx_attach(unsigned gsi, volatile uint8_t *isr)
{
    unsigned line = 0, sharer = 0;
    while (line < INTX_LINES && intx_isr[line * INTX_SHARERS] && intx_gsi[line] != gsi)
        line++;
    require(line < INTX_LINES, "more than %u INTx lines in use", INTX_LINES);
    while (sharer < INTX_SHARERS && intx_isr[line * INTX_SHARERS + sharer])
        sharer++;
    require(sharer < INTX_SHARERS, "more than %u devices on gsi %u", INTX_SHARERS, gsi);
    intx_isr[line * INTX_SHARERS + sharer] = (uint64_t)isr;
    intx_gsi[line] = gsi;
    ioapic_write(0x11 + gsi * 2, lapic_id() << 24);
    ioapic_write(0x10 + gsi * 2, LEVEL | (VECTOR_INTX + line));
    return VECTOR_INTX + line;
}
