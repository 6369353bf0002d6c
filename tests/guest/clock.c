/* Nanoseconds from the TSC, by kvmclock's factors where KVM gives them, else measured against the PM timer. */
#include "guest.h"

#define MSR_SYSTEM_TIME_NEW 0x4b564d01
#define PM_TIMER_HZ 3579545

struct kvm_time {
    uint32_t version, pad;
    uint64_t tsc, system_time;
    uint32_t multiplier;
    int8_t shift;
    uint8_t flags, reserved[2];
};

static volatile struct kvm_time kvm_time __attribute__((aligned(64)));
static uint64_t ticks_per_ms = 2000000, tsc_zero;
static const char *source = "assumed 2 GHz";

const char *clock_source(void) { return source; }

static bool from_kvmclock(void)
{
    uint32_t id[4];
    cpuid(0x40000000, id);
    if (id[1] != 0x4b4d564b)
        return false;
    cpuid(0x40000001, id);
    if (!(id[0] & 8) || service(SERVICE_WRMSR, MSR_SYSTEM_TIME_NEW, (uint64_t)&kvm_time | 1).failed)
        return false;
    if (!kvm_time.multiplier)
        return false;
    /* ns = (ticks << shift) * multiplier >> 32, hence ticks in a millisecond: */
    uint64_t ticks = (1000000ull << 32) / kvm_time.multiplier;
    ticks_per_ms = kvm_time.shift < 0 ? ticks << -kvm_time.shift : ticks >> kvm_time.shift;
    source = "kvmclock";
    return true;
}

static void from_pm_timer(void)
{
    uint32_t begin = in32(acpi.pm_timer), ticks;
    uint64_t tsc = rdtsc();
    do
        ticks = (in32(acpi.pm_timer) - begin) & 0xffffff;
    while (ticks < PM_TIMER_HZ / 50);
    ticks_per_ms = (rdtsc() - tsc) * PM_TIMER_HZ / ticks / 1000;
    source = "pm-timer";
}

void clock_init(void)
{
    tsc_zero = rdtsc();
    if (!from_kvmclock() && acpi.pm_timer)
        from_pm_timer();
}

uint64_t tsc_to_ns(uint64_t ticks)
{
    return ticks / ticks_per_ms * 1000000 + ticks % ticks_per_ms * 1000000 / ticks_per_ms;
}

uint64_t ns_to_tsc(uint64_t ns) { return ns / 1000000 * ticks_per_ms + ns % 1000000 * ticks_per_ms / 1000000; }
uint64_t now_ns(void) { return tsc_to_ns(rdtsc() - tsc_zero); }

void delay_us(uint64_t us)
{
    uint64_t end = rdtsc() + ns_to_tsc(us * 1000);
    while ((int64_t)(end - rdtsc()) > 0)
        pause();
}
