/* From the PVH entry (32-bit, paging off) to ring 3 in as few ring-0 instructions as possible: on a host
   that interprets ring 0 each of them costs about a microsecond. The selectors are Linux's, because such a
   host knows no others. Tables are static; ring 3 may write all of them, so C fills the IDT there. */
#include "layout.h"

        .section .note.pvh, "a", @note
        .long 4, 4, 18                          /* "Xen", XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz "Xen"
        .long pvh_entry

        .section .text.boot, "ax"
        .code32
        .globl pvh_entry
pvh_entry:
        movb $0x40, %al
        outb %al, $0x80
        movl %ebx, start_info
        movl $user_stack_end, boot_stack
        xorl %esi, %esi                         /* the boot CPU's number */
        movl $gdts, %edi
/* esi: CPU number, edi: its GDT (of GDT_BYTES). Application processors come here from the trampoline. */
enter_long:
        imull $KERNEL_STACK, %esi, %ebp
        addl $kernel_stacks + KERNEL_STACK, %ebp
        imull $TSS_BYTES, %esi, %eax
        addl $tsses, %eax
        movl %ebp, 4(%eax)                      /* RSP0 */
        movw $104, 102(%eax)                    /* the I/O bitmap, all zeroes: see layout.h */
        movw %ax, TSS_SELECTOR + 2(%edi)        /* the descriptor's base, in three pieces */
        shrl $16, %eax
        movb %al, TSS_SELECTOR + 4(%edi)
        movb %ah, TSS_SELECTOR + 7(%edi)
        imull $10, %esi, %eax
        movl %edi, gdt_pointers + 2(%eax)
        lgdt gdt_pointers(%eax)
        movl $0x620, %eax                       /* PAE, OSFXSR, OSXMMEXCPT */
        movl %eax, %cr4
        movl $pml4, %eax
        movl %eax, %cr3
        movl $0xc0000080, %ecx
        rdmsr
        orl $0x100, %eax                        /* EFER.LME */
        wrmsr
        movl $0x80010033, %eax                  /* PG, WP, NE, ET, MP, PE */
        movl %eax, %cr0
        ljmp $KERNEL_CS, $long_mode

        .code64
long_mode:
        movl $KERNEL_DS, %eax
        movl %eax, %ss
        movl $USER_DS, %eax
        movl %eax, %ds
        movl %eax, %es
        xorl %eax, %eax
        movl %eax, %fs
        movl %eax, %gs
        lidt idt_pointer
        movl $TSS_SELECTOR, %eax
        ltr %ax
        movl %ebp, %esp
        pushq $USER_DS
        pushq boot_stack
        pushq $0x3002                           /* IOPL 3; interrupts off until C asks for them */
        pushq $USER_CS
        pushq $ring3
        iretq

ring3:
        movl %esi, %edi
        cmpl $0, %edi
        jne 1f
        movb $0x41, %al
        outb %al, $0x80
        call guest_main
1:      call ap_main
        ud2

/* Application processors start here, copied below 1 MiB; ap_number was stored by the waker. */
        .code16
        .globl trampoline, trampoline_end
trampoline:
        cli
        xorw %ax, %ax
        movw %ax, %ds
        lgdtl TRAMPOLINE + trampoline_gdt_pointer - trampoline
        movl $0x11, %eax
        movl %eax, %cr0
        ljmpl $8, $trampoline32
        .balign 8
trampoline_gdt:
        .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
trampoline_gdt_pointer:
        .word 23
        .long TRAMPOLINE + trampoline_gdt - trampoline
trampoline_end:
        .code32
trampoline32:
        movl $16, %eax
        movl %eax, %ds
        movl %eax, %es
        movl %eax, %ss
        movl ap_number, %esi
        imull $GDT_BYTES, %esi, %edi
        addl $gdts, %edi
        jmp enter_long

        .section .tables, "aw"
        .balign 4096
        .globl pml4, pdpt, idt, gdts
pml4:   .quad pdpt + 7
        .fill 511, 8, 0
pdpt:   .quad page_directories + 7, page_directories + 0x1007, page_directories + 0x2007, page_directories + 0x3007
        .fill 508, 8, 0
page_directories:                               /* the first 4 GiB, in 2 MiB pages, open to ring 3 */
        .set page, 0
        .rept 2048
        .quad page + 0x87
        .set page, page + 0x200000
        .endr
idt:    .fill 512, 8, 0
gdts:   .rept MAX_CPUS
        .quad 0, 0x00cf9b000000ffff, 0x00af9b000000ffff, 0x00cf93000000ffff
        .quad 0x00cffb000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff, 0
        .quad 0x0000890000002068, 0
        .endr
        .balign 8
idt_pointer:
        .word 4095
        .quad idt
        .balign 8
gdt_pointers:
        .rept MAX_CPUS
        .word GDT_BYTES - 1
        .quad 0
        .endr
        .balign 8
        .globl start_info, boot_stack, ap_number
start_info: .quad 0
boot_stack: .quad 0
ap_number: .quad 0

        .bss
        .balign 4096
tsses:  .skip MAX_CPUS * TSS_BYTES
        .balign 4096
kernel_stacks: .skip MAX_CPUS * KERNEL_STACK
user_stack: .skip 65536
user_stack_end:
        .section .note.GNU-stack, "", @progbits
