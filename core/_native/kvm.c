/* KVM calls with fixed arguments: a variadic ioctl through cffi would pass garbage for a missing one. */
#include "vcpu.h"

#include <cpuid.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/kvm.h>

#define CPUID_ENTRIES 256
#define APIC_LVT0 0x350
#define APIC_LVT1 0x360
#define APIC_MODE_EXTINT 0x700
#define APIC_MODE_NMI 0x400
#define MSR_IA32_MISC_ENABLE 0x1a0
#define MSR_MTRR_DEF_TYPE 0x2ff
#define MTRR_ENABLE_WRITE_BACK 0x806
#define CR0_PE (1u << 0)
#define CR0_ET (1u << 4)
#define CR0_PG (1u << 31)
#define CR4_PAE (1u << 5)
#define EFER_LME (1u << 8)
#define EFER_LMA (1u << 10)

int cv_ioctl(int fd, unsigned long request, unsigned long argument)
{
    int result = ioctl(fd, request, argument);

    return result < 0 ? -errno : result;
}

int cv_vm_set_region(int vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size, uint64_t host)
{
    struct kvm_userspace_memory_region region = { slot, flags, gpa, size, host };

    return cv_ioctl(vm, KVM_SET_USER_MEMORY_REGION, (unsigned long)&region);
}

int cv_vm_irq_line(int vm, uint32_t gsi, uint32_t level)
{
    struct kvm_irq_level line = { .irq = gsi, .level = level };

    return cv_ioctl(vm, KVM_IRQ_LINE, (unsigned long)&line);
}

int cv_vm_irqfd(int vm, int fd, uint32_t gsi, uint32_t flags)
{
    struct kvm_irqfd irqfd = { .fd = fd, .gsi = gsi, .flags = flags };

    return cv_ioctl(vm, KVM_IRQFD, (unsigned long)&irqfd);
}

int cv_vm_ioeventfd(int vm, int fd, uint64_t address, uint32_t length, uint32_t flags)
{
    struct kvm_ioeventfd doorbell = { .addr = address, .len = length, .fd = fd, .flags = flags };

    return cv_ioctl(vm, KVM_IOEVENTFD, (unsigned long)&doorbell);
}

int cv_vm_signal_msi(int vm, uint64_t address, uint32_t data)
{
    struct kvm_msi msi = { .address_lo = (uint32_t)address, .address_hi = address >> 32, .data = data };

    return cv_ioctl(vm, KVM_SIGNAL_MSI, (unsigned long)&msi);
}

int cv_vm_set_routes(int vm, uint32_t pins, const struct cv_msi_route *routes, uint32_t count)
{
    struct kvm_irq_routing *table;
    int result;

    table = calloc(1, sizeof(*table) + (pins + count) * sizeof(table->entries[0]));
    if (!table)
        return -ENOMEM;
    table->nr = pins + count;
    for (uint32_t pin = 0; pin < pins; pin++) {
        struct kvm_irq_routing_entry *entry = &table->entries[pin];

        entry->gsi = pin;
        entry->type = KVM_IRQ_ROUTING_IRQCHIP;
        entry->u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
        entry->u.irqchip.pin = pin;
    }
    for (uint32_t i = 0; i < count; i++) {
        struct kvm_irq_routing_entry *entry = &table->entries[pins + i];

        entry->gsi = routes[i].gsi;
        entry->type = KVM_IRQ_ROUTING_MSI;
        entry->u.msi.address_lo = (uint32_t)routes[i].address;
        entry->u.msi.address_hi = routes[i].address >> 32;
        entry->u.msi.data = routes[i].data;
    }
    result = cv_ioctl(vm, KVM_SET_GSI_ROUTING, (unsigned long)table);
    free(table);
    return result;
}

/* ---- architectural state ------------------------------------------------------------------------ */

static uint32_t bits_for(uint32_t count)
{
    uint32_t bits = 0;

    while ((1u << bits) < count)
        bits++;
    return bits;
}

/* Topology: one package, `vcpus` cores, one thread each (SDM vol. 2A leaf 0BH; APM vol. 3 E.4.8, E.4.17). */
static void patch(struct kvm_cpuid_entry2 *entry, uint32_t apic_id, uint32_t vcpus, uint32_t tsc_deadline)
{
    switch (entry->function) {
    case 0x1:
        entry->ebx = (entry->ebx & 0xffff) | ((vcpus & 0xff) << 16) | ((apic_id & 0xff) << 24);
        entry->ecx |= 1u << 31;
        if (tsc_deadline)
            entry->ecx |= 1u << 24;
        if (vcpus > 1)
            entry->edx |= 1u << 28;
        break;
    case 0x80000008:
        entry->ecx = (entry->ecx & ~0xf0ffu) | ((vcpus - 1) & 0xff) | (bits_for(vcpus) << 12);
        break;
    case 0x8000001e:
        entry->eax = apic_id;
        entry->ebx = apic_id & 0xff;
        entry->ecx = 0;
        break;
    default:
        break;
    }
}

static void topology(struct kvm_cpuid_entry2 *entry, uint32_t function, uint32_t level, uint32_t apic_id,
                     uint32_t vcpus)
{
    *entry = (struct kvm_cpuid_entry2){
        .function = function,
        .index = level,
        .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        .edx = apic_id,
        .ecx = level,
    };
    if (level == 0) {
        entry->ebx = 1;
        entry->ecx |= 1 << 8;
    } else if (level == 1) {
        entry->eax = bits_for(vcpus);
        entry->ebx = vcpus;
        entry->ecx |= 2 << 8;
    }
}

int cv_vcpu_set_cpuid(int kvm, int fd, uint32_t apic_id, uint32_t vcpus, uint32_t tsc_deadline)
{
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + CPUID_ENTRIES * sizeof(cpuid->entries[0]));
    uint32_t kept = 0, extended_topology = 0;
    int result;

    if (!cpuid)
        return -ENOMEM;
    cpuid->nent = CPUID_ENTRIES - 6;
    result = cv_ioctl(kvm, KVM_GET_SUPPORTED_CPUID, (unsigned long)cpuid);
    if (result < 0)
        goto out;
    for (uint32_t i = 0; i < cpuid->nent; i++) {
        struct kvm_cpuid_entry2 *entry = &cpuid->entries[i];

        if (entry->function == 0xb || entry->function == 0x1f) {
            extended_topology |= entry->function == 0xb ? 1 : 2;
            continue;
        }
        patch(entry, apic_id, vcpus, tsc_deadline);
        cpuid->entries[kept++] = *entry;
    }
    for (uint32_t level = 0; level < 3; level++) {
        if (extended_topology & 1)
            topology(&cpuid->entries[kept++], 0xb, level, apic_id, vcpus);
        if (extended_topology & 2)
            topology(&cpuid->entries[kept++], 0x1f, level, apic_id, vcpus);
    }
    cpuid->nent = kept;
    result = cv_ioctl(fd, KVM_SET_CPUID2, (unsigned long)cpuid);
out:
    free(cpuid);
    return result;
}

static struct kvm_segment segment(uint16_t selector, uint8_t type, int code64, int code32)
{
    return (struct kvm_segment){
        .base = 0, .limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .s = 1,
        .l = code64, .db = !code64, .g = 1,
    };
}

int cv_vcpu_set_entry(int fd, int kind, uint64_t rip, uint64_t boot_params, uint64_t page_tables, uint64_t gdt,
                      uint64_t stack)
{
    struct kvm_sregs sregs;
    struct kvm_regs regs = { .rip = rip, .rflags = 2, .rsp = stack, .rbp = stack };
    int result = cv_ioctl(fd, KVM_GET_SREGS, (unsigned long)&sregs);
    int code64 = kind == CV_ENTRY_LONG;

    if (result < 0)
        return result;
    sregs.cs = segment(0x10, 0xb, code64, !code64);
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment(0x18, 0x3, 0, 1);
    sregs.tr = (struct kvm_segment){ .limit = 0x67, .selector = 0x20, .type = 0xb, .present = 1 };
    sregs.gdt.base = gdt;
    sregs.gdt.limit = 0x2f;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    if (code64) {
        sregs.cr3 = page_tables;
        sregs.cr4 = CR4_PAE;
        sregs.cr0 |= CR0_PG;
        sregs.efer = EFER_LME | EFER_LMA;
        regs.rsi = boot_params; /* 64-bit boot protocol */
    } else {
        sregs.cr4 = 0;
        sregs.efer = 0;
        regs.rbx = boot_params; /* PVH: hvm_start_info */
    }
    result = cv_ioctl(fd, KVM_SET_SREGS, (unsigned long)&sregs);
    return result < 0 ? result : cv_ioctl(fd, KVM_SET_REGS, (unsigned long)&regs);
}

int cv_vcpu_set_defaults(int fd, int boot)
{
    static const uint32_t defaults[][2] = {
        { MSR_IA32_MISC_ENABLE, 1 },
        { MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK },
    };
    struct kvm_fpu fpu = { .fcw = 0x37f, .mxcsr = 0x1f80 };
    struct kvm_lapic_state lapic;
    uint32_t word;
    int result = cv_ioctl(fd, KVM_SET_FPU, (unsigned long)&fpu);

    if (result < 0)
        return result;
    for (size_t i = 0; i < sizeof(defaults) / sizeof(defaults[0]); i++) {
        struct {
            struct kvm_msrs head;
            struct kvm_msr_entry entry;
        } msrs = { { .nmsrs = 1 }, { .index = defaults[i][0], .data = defaults[i][1] } };

        /* 0 set: this KVM does not know the register, and the guest will not either */
        result = cv_ioctl(fd, KVM_SET_MSRS, (unsigned long)&msrs);
        if (result < 0)
            return result;
    }
    result = cv_ioctl(fd, KVM_GET_LAPIC, (unsigned long)&lapic);
    if (result < 0)
        return result;
    word = APIC_MODE_EXTINT;
    memcpy(lapic.regs + APIC_LVT0, &word, sizeof(word));
    word = APIC_MODE_NMI;
    memcpy(lapic.regs + APIC_LVT1, &word, sizeof(word));
    return cv_ioctl(fd, KVM_SET_LAPIC, (unsigned long)&lapic);
}

uint32_t cv_phys_bits(void)
{
    uint32_t eax, ebx, ecx, edx;

    return __get_cpuid(0x80000008, &eax, &ebx, &ecx, &edx) ? eax & 0xff : 36;
}

int cv_vcpu_get_rip(int fd, uint64_t *rip, uint64_t *cr3)
{
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    int result = cv_ioctl(fd, KVM_GET_REGS, (unsigned long)&regs);

    if (result >= 0)
        result = cv_ioctl(fd, KVM_GET_SREGS, (unsigned long)&sregs);
    if (result < 0)
        return result;
    *rip = regs.rip;
    *cr3 = sregs.cr3;
    return 0;
}
