/* The end: one result line, then what `end=` says (off, reset, i8042, triple, exit, stay). */
#include <stdarg.h>
#include "guest.h"

extern uint64_t idt[512];
void print_arguments(const char *format, va_list arguments);

/* ACPI if its tables say how, else the VMM's own sleep register. */
static void power_off(void)
{
    if (acpi.sleep_port)
        out8(acpi.sleep_port, 5 << 2 | 0x20);
    else if (acpi.pm1a_control)
        out16(acpi.pm1a_control, 0x2000);
    out8(0x600, 0x34);
}

static void triple_fault(void)
{
    for (unsigned i = 0; i < 512; i++)
        idt[i] = 0;
    __asm__ volatile("ud2");
}

void platform_end(const char *how)
{
    if (same(how, "reset"))
        out8(acpi.reset_port ? acpi.reset_port : 0x600, acpi.reset_port ? acpi.reset_value : 1);
    else if (same(how, "i8042"))
        out8(0x64, 0xfe);
    else if (same(how, "triple"))
        triple_fault();
    else if (same(how, "exit"))
        out8((uint16_t)param_number("exit-port", 0xf4), 0);
    else if (!same(how, "stay"))
        power_off();
    if (!same(how, "stay")) {
        delay_us(2000000);
        print("end.ignored=%s\n", how);
    }
    for (;;)
        halt(irq_total);
}

void finish(void)
{
    print("result=ok\n");
    platform_end(param("end", "off"));
}

void fail(const char *format, ...)
{
    static bool failing;
    va_list arguments;
    if (!failing) {
        failing = true;
        va_start(arguments, format);
        print("result=fail reason=");
        print_arguments(format, arguments);
        print("\n");
        va_end(arguments);
    }
    platform_end(param("end-fail", "off"));
}
