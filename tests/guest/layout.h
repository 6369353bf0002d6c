/* Numbers that assembler and C share. The selectors are Linux's (see boot.S). */
#ifndef GUEST_LAYOUT_H
#define GUEST_LAYOUT_H

#define KERNEL_CS 0x10
#define KERNEL_DS 0x18
#define USER_DS 0x2b
#define USER_CS 0x33
#define TSS_SELECTOR 0x40
#define GDT_BYTES 80
/* A TSS with an I/O bitmap that permits every port: kvm_pvm drops IOPL on the way to ring 3. */
#define TSS_BYTES 8448
#define KERNEL_STACK 4096
#define MAX_CPUS 64
#define TRAMPOLINE 0x8000

/* Interrupt vectors. Each device vector counts in irq_count[]; an INTx vector also reads ISR registers. */
#define VECTOR_TIMER 0x20
#define VECTOR_IPI 0x21
#define VECTOR_SPURIOUS 0x2f
#define VECTOR_MSI 0x30
#define VECTOR_MSI_END 0xd0
#define VECTOR_INTX 0xd0
#define INTX_LINES 8
#define INTX_SHARERS 4

/* What ring 3 asks of ring 0: the number in rax, then int3 (the one gate that every host delivers). */
#define SERVICE_HALT 0
#define SERVICE_RDMSR 1
#define SERVICE_WRMSR 2
#define SERVICE_STI 3
#define SERVICE_CLI 4
#define SERVICE_FLUSH_TLB 5
#define SERVICE_STOP 6

#endif
