# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
#
# A guest in one sector: writes a range of its second disk, 32 KiB a call, each
# sector stamped with (start word of the run, its own LBA), and says how it goes
# on the debug port 0xe9: '.' a call, 'E' an error (retried), 'D' done.
        .code16
        .globl _start
_start: cli
        xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %ss
        movw $0x7c00, %sp
        sti
        movw $0x1000, %ax               # the buffer, 0x10000
        movw %ax, %es
next:   movl lba, %eax                  # stamp the 64 sectors
        movl stamp, %ebx
        xorw %di, %di
        movw $64, %cx
mark:   movl %ebx, %es:(%di)
        movl %eax, %es:4(%di)
        incl %eax
        addw $512, %di
        loop mark
again:  movw $0x4300, %ax               # extended write
        movb $0x81, %dl
        movw $dap, %si
        int  $0x13
        jc   fail
        movb $'.', %al
        outb %al, $0xe9
        movl step, %eax
        addl %eax, lba
        movl lba, %eax
        cmpl last, %eax
        jb   next
        movb $'D', %al
        outb %al, $0xe9
halt:   hlt
        jmp  halt
fail:   movb $'E', %al
        outb %al, $0xe9
        jmp  again
        .org 0x1d0                      # patched by the test
last:   .long 0                         # 0x1d0: stop when the LBA reaches this
step:   .long 64                        # 0x1d4: sectors from one call to the next
stamp:  .long 0                         # 0x1d8
        .org 0x1e0
dap:    .byte 16, 0
        .word 64
        .word 0, 0x1000                 # offset, segment
lba:    .long 0, 0                      # 0x1e8: first LBA
        .org 0x1fe
        .word 0xaa55
