/* What every part of the guest may use: output, the command line, memory, time, traps, the end. */
#ifndef GUEST_GUEST_H
#define GUEST_GUEST_H
#include "x86.h"

#define PAGE 4096ull
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))

/* text.c: print knows %s %c %d %u %x, the numbers also with l; no widths. */
void output_init(void);
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int byte, size_t size);
int memcmp(const void *left, const void *right, size_t size);
size_t strlen(const char *text);
bool same(const char *left, const char *right);
bool starts(const char *text, const char *prefix);
/* Parse decimal or 0x hexadecimal with an optional K, M or G; `end` gets the first byte not used. */
uint64_t number(const char *text, const char **end);

/* params.c: key=value words of the command line. */
void params_init(const char *cmdline);
/* Have "key=value:key=value" win until params_pop(what this returned); one level. */
unsigned params_push(const char *words, size_t length);
void params_pop(unsigned before);
const char *param(const char *key, const char *missing);
uint64_t param_number(const char *key, uint64_t missing);
bool param_is(const char *key, const char *value);

/* memory.c: everything is mapped at its physical address. */
struct module {
    uint64_t address, size;
};
void memory_init(void);
void memory_report(void);
const char *boot_cmdline(void);
uint64_t boot_rsdp(void);
struct module boot_module(void);
void *allocate(uint64_t size, uint64_t alignment);
/* Make [address, address + size) reachable; beyond the first 4 GiB nothing is at the start. */
void map_range(uint64_t address, uint64_t size);
uint64_t ram_end(void);
bool is_ram(uint64_t address, uint64_t size);
uint64_t ram_total(void);

/* clock.c */
void clock_init(void);
uint64_t tsc_to_ns(uint64_t ticks);
uint64_t ns_to_tsc(uint64_t ns);
uint64_t now_ns(void);
void delay_us(uint64_t us);
const char *clock_source(void);

/* traps.c */
extern volatile uint64_t irq_count[256];
extern volatile uint64_t irq_total;
void traps_init(void);
void lapic_init(void);
void timer_start(unsigned hz);
unsigned lapic_id(void);
unsigned vector_allocate(void);
void interrupts_on(void);
void interrupts_off(void);
/* Sleep until an interrupt, unless irq_total is no longer `seen`. */
void halt(uint64_t seen);
/* Route `gsi` level-triggered to an INTx vector that reads the ISR register at `isr`. Returns the vector. */
unsigned intx_attach(unsigned gsi, volatile uint8_t *isr);
/* Write the interrupt command register. */
void ipi_send(unsigned apic_id, uint32_t command);

/* acpi.c */
struct acpi {
    uint64_t rsdp, ecam, lapic, ioapic;
    uint32_t table_count;
    char tables[16][5];
    bool hw_reduced;
    uint16_t pm_timer, sleep_port, reset_port, pm1a_control;
    uint8_t reset_value;
    unsigned cpu_count;
    uint32_t apic_ids[MAX_CPUS];
};
extern struct acpi acpi;
void acpi_init(void);

/* smp.c: run `work(argument)` on an application processor. */
unsigned smp_start(void);
unsigned smp_count(void);
void smp_run(unsigned cpu, void (*work)(void *), void *argument);
unsigned smp_apic_id(unsigned cpu);
bool smp_wait(unsigned cpu, uint64_t timeout_ms);

/* power.c */
void finish(void) __attribute__((noreturn));
void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
void platform_end(const char *how) __attribute__((noreturn));
#define require(condition, ...) do { if (!(condition)) fail(__VA_ARGS__); } while (0)

uint64_t random_next(uint64_t *state);
uint32_t crc32(uint32_t crc, const void *data, size_t size);

#endif
