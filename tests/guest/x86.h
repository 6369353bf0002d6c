/* Single instructions: ports, memory-mapped registers of an exact width, time, identification. */
#ifndef GUEST_X86_H
#define GUEST_X86_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "layout.h"

static inline void out8(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out16(uint16_t port, uint16_t value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out32(uint16_t port, uint32_t value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }

static inline uint8_t in8(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint16_t in16(uint16_t port)
{
    uint16_t value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint32_t in32(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* One access of exactly `size` bytes (1, 2, 4 or 8), aligned or not, with a plain mov. */
static inline uint64_t bus_read(uint64_t address, unsigned size)
{
    uint8_t b;
    uint16_t w;
    uint32_t d;
    uint64_t q;
    switch (size) {
    case 1: __asm__ volatile("movb (%1), %0" : "=q"(b) : "r"(address) : "memory"); return b;
    case 2: __asm__ volatile("movw (%1), %0" : "=r"(w) : "r"(address) : "memory"); return w;
    case 4: __asm__ volatile("movl (%1), %0" : "=r"(d) : "r"(address) : "memory"); return d;
    default: __asm__ volatile("movq (%1), %0" : "=r"(q) : "r"(address) : "memory"); return q;
    }
}

static inline void bus_write(uint64_t address, unsigned size, uint64_t value)
{
    switch (size) {
    case 1: __asm__ volatile("movb %0, (%1)" ::"q"((uint8_t)value), "r"(address) : "memory"); break;
    case 2: __asm__ volatile("movw %0, (%1)" ::"r"((uint16_t)value), "r"(address) : "memory"); break;
    case 4: __asm__ volatile("movl %0, (%1)" ::"r"((uint32_t)value), "r"(address) : "memory"); break;
    default: __asm__ volatile("movq %0, (%1)" ::"r"(value), "r"(address) : "memory"); break;
    }
}

static inline uint32_t port_read(uint16_t port, unsigned size)
{
    return size == 1 ? in8(port) : size == 2 ? in16(port) : in32(port);
}

static inline void port_write(uint16_t port, unsigned size, uint32_t value)
{
    if (size == 1)
        out8(port, (uint8_t)value);
    else if (size == 2)
        out16(port, (uint16_t)value);
    else
        out32(port, value);
}

static inline uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (uint64_t)high << 32 | low;
}

static inline void cpuid(uint32_t leaf, uint32_t out[4])
{
    __asm__ volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(0));
}

static inline void pause(void) { __asm__ volatile("pause" ::: "memory"); }
static inline void fence(void) { __asm__ volatile("mfence" ::: "memory"); }
static inline void barrier(void) { __asm__ volatile("" ::: "memory"); }

struct service_result {
    uint64_t value;
    bool failed;
};

/* Call ring 0 (SERVICE_...). */
static inline struct service_result service(unsigned number, uint64_t first, uint64_t second)
{
    uint64_t rax = number, rdx = 0;
    __asm__ volatile("int3" : "+a"(rax), "+d"(rdx) : "D"(first), "S"(second) : "rcx", "memory", "cc");
    return (struct service_result){rax, rdx == 1};
}

#endif
