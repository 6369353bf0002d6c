/* Ring-0 entry points: exceptions (reported by ring 3), interrupts (counted), and the service call. */
#include "layout.h"
        .text
        .code64
        .globl interrupt_stubs, intx_stubs, exception_stubs, service_entry

/* One per vector from 0x20 on, 32 bytes apart: count it and tell the local APIC. */
        .balign 32
interrupt_stubs:
        .set vector, 0x20
        .rept 0xd0 - 0x20
        .balign 32
        pushq %rax
        lock incq irq_count + vector * 8
        jmp end_of_interrupt
        .set vector, vector + 1
        .endr

/* One per INTx line: reading ISR lowers the line, or the interrupt would come again at once. */
        .balign 32
intx_stubs:
        .set line, 0
        .rept INTX_LINES
        .balign 32
        pushq %rax
        pushq %rdx
        pushq %rcx
        movl $line, %ecx
        jmp intx_common
        .set line, line + 1
        .endr
intx_common:
        lock incq irq_count + VECTOR_INTX * 8(, %rcx, 8)
        movl %ecx, %edx
        shll $5, %edx                           /* INTX_SHARERS * 8 */
1:      movq intx_isr(%rdx), %rax
        testq %rax, %rax
        jz 2f
        movb (%rax), %al
        orb %al, intx_seen(%rcx)
        addl $8, %edx
        testl $31, %edx
        jnz 1b
2:      popq %rcx
        popq %rdx
end_of_interrupt:
        lock incq irq_total
        xorl %eax, %eax
        movabsl %eax, 0xfee000b0
        popq %rax
        iretq

/* Exceptions 0..31: leave the facts in `exception` and return to ring 3 at exception_report. */
        .balign 32
exception_stubs:
        .set vector, 0
        .rept 32
        .balign 32
        .if !(0x60227d00 >> vector & 1)         /* 8, 10-14, 17, 21, 29 and 30 push an error code themselves */
        pushq $0
        .endif
        pushq $vector
        jmp exception_common
        .set vector, vector + 1
        .endr
exception_common:
        cmpq $rdmsr_site, 16(%rsp)
        je msr_fault
        cmpq $wrmsr_site, 16(%rsp)
        je msr_fault
        cmpq $2, (%rsp)                         /* an NMI: only counted */
        je nmi
        popq exception
        popq exception + 8
        movq (%rsp), %rax
        movq %rax, exception + 16
        movq 8(%rsp), %rax
        movq %rax, exception + 24
        movq 24(%rsp), %rax
        movq %rax, exception + 32
        movq %cr2, %rax
        movq %rax, exception + 40
        movq $exception_report, (%rsp)
        movq $USER_CS, 8(%rsp)
        movq $0x3002, 16(%rsp)
        movq $exception_stack_end - 8, 24(%rsp)
        movq $USER_DS, 32(%rsp)
        iretq
nmi:    addq $16, %rsp
        lock incq irq_count + 16
        iretq
msr_fault:
        addq $16, %rsp
        movq $msr_failed, (%rsp)
        iretq

        .balign 32
service_entry:
        cmpl $SERVICE_HALT, %eax
        jne 1f
        cmpq irq_total, %rdi                    /* interrupts are off here: nothing comes between */
        jne 2f
        sti
        hlt
        cli
2:      iretq
1:      cmpl $SERVICE_STI, %eax
        jne 1f
        orl $0x200, 16(%rsp)
        iretq
1:      cmpl $SERVICE_CLI, %eax
        jne 1f
        andl $~0x200, 16(%rsp)
        iretq
1:      cmpl $SERVICE_FLUSH_TLB, %eax
        jne 1f
        movq %cr3, %rax
        movq %rax, %cr3
        iretq
1:      cmpl $SERVICE_STOP, %eax
        jne 1f
        hlt
        iretq
1:      movl %edi, %ecx                         /* an MSR: its number in rdi, the value in rsi or back in rax */
        cmpl $SERVICE_RDMSR, %eax
        jne 1f
rdmsr_site:
        rdmsr
        shlq $32, %rdx
        orq %rdx, %rax
        xorl %edx, %edx
        iretq
1:      movq %rsi, %rdx
        shrq $32, %rdx
        movl %esi, %eax
wrmsr_site:
        wrmsr
        xorl %edx, %edx
        iretq
msr_failed:                                     /* #GP at one of the two sites ends here */
        movl $1, %edx
        iretq

        .bss
        .balign 16
exception_stack: .skip 16384
exception_stack_end:
        .section .note.GNU-stack, "", @progbits
