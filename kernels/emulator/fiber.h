// One CUDA thread = one fiber: its own stack, switched by hand. x86-64 has a switch of a dozen instructions; other
// hosts use ucontext.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define EMU_ASAN 0
#endif

namespace emu {

// A suspended stack: what `switch_context` saves and resumes.
struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t machine;
#endif
    char* stack = nullptr;  // lowest address; of the OS thread itself: learnt at the first switch (ASan only)
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
};

// Bytes of a fiber's stack. A kernel's accumulators live there: 128 floats and what the compiler spills.
constexpr size_t kStackBytes = EMU_ASAN ? 512 * 1024 : 128 * 1024;

// Maps a stack with a guard page below it.
char* map_stack();

// Makes `context` start at `entry(argument)` on its stack; `entry` must not return.
void prepare_context(Context& context, void (*entry)(void*), void* argument);

// Saves the running context into `from` and resumes `to`. `last`: `from` will never be resumed.
void switch_context(Context& from, Context& to, bool last);

// To be called first by an entry function.
void entered_context(Context& self);

}  // namespace emu
