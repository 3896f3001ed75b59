#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

namespace emu {

char* map_stack() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* mapped = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED || mprotect(mapped, page, PROT_NONE) != 0) {
        perror("cuda emulator: no memory for a thread's stack");
        abort();
    }
    return static_cast<char*>(mapped) + page;
}

#if defined(__x86_64__)

// void emu_switch(void** save, void* load): the callee-saved registers go onto the stack, the stack pointer is exchanged.
// void emu_start(): first entry of a fiber; r12 = function, r13 = argument. The zero frame ends backtraces.
asm(R"(
.text
.p2align 4
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch, .-emu_switch
.p2align 4
.globl emu_start
.hidden emu_start
.type emu_start, @function
emu_start:
    .cfi_startproc
    .cfi_undefined rip
    movq %r13, %rdi
    xorl %ebp, %ebp
    call *%r12
    ud2
    .cfi_endproc
.size emu_start, .-emu_start
)");
extern "C" void emu_switch(void** save, void* load) __attribute__((visibility("hidden")));
extern "C" void emu_start() __attribute__((visibility("hidden")));

void prepare_context(Context& context, void (*entry)(void*), void* argument) {
    uintptr_t top = (reinterpret_cast<uintptr_t>(context.stack) + context.stack_bytes) & ~uintptr_t(15);
    void** slot = reinterpret_cast<void**>(top) - 3;
    slot[0] = reinterpret_cast<void*>(&emu_start);  // where `ret` goes; the stack pointer is then a multiple of 16, as before a call
    slot -= 6;
    slot[0] = nullptr;                             // r15
    slot[1] = nullptr;                             // r14
    slot[2] = argument;                            // r13
    slot[3] = reinterpret_cast<void*>(entry);      // r12
    slot[4] = nullptr;                             // rbx
    slot[5] = nullptr;                             // rbp
    context.stack_pointer = slot;
    context.fake_stack = nullptr;
}

static void raw_switch(Context& from, Context& to) { emu_switch(&from.stack_pointer, to.stack_pointer); }

#else

static void start(unsigned low_entry, unsigned high_entry, unsigned low_argument, unsigned high_argument) {
    auto join = [](unsigned low, unsigned high) { return static_cast<uintptr_t>(static_cast<uint64_t>(high) << 32 | low); };
    reinterpret_cast<void (*)(void*)>(join(low_entry, high_entry))(reinterpret_cast<void*>(join(low_argument, high_argument)));
}

void prepare_context(Context& context, void (*entry)(void*), void* argument) {
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = context.stack;
    context.machine.uc_stack.ss_size = context.stack_bytes;
    context.machine.uc_link = nullptr;
    const uint64_t e = reinterpret_cast<uintptr_t>(entry), a = reinterpret_cast<uintptr_t>(argument);
    makecontext(&context.machine, reinterpret_cast<void (*)()>(start), 4, static_cast<unsigned>(e), static_cast<unsigned>(e >> 32),
                static_cast<unsigned>(a), static_cast<unsigned>(a >> 32));
    context.fake_stack = nullptr;
}

static void raw_switch(Context& from, Context& to) { swapcontext(&from.machine, &to.machine); }

#endif

// The context that was left at the last switch of this OS thread; the sanitizer tells the bounds of its stack.
static __thread Context* left;

static void finish(Context& self) {
#if EMU_ASAN
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &bytes);
    if (left && !left->stack) {  // the OS thread's own stack
        left->stack = static_cast<char*>(const_cast<void*>(bottom));
        left->stack_bytes = bytes;
    }
#else
    (void)self;
#endif
}

void switch_context(Context& from, Context& to, bool last) {
    left = &from;
#if EMU_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#else
    (void)last;
#endif
    raw_switch(from, to);
    finish(from);
}

void entered_context(Context& self) { finish(self); }

}  // namespace emu
