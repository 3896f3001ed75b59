// Reports: which thread, which line of the kernel, who waits where.
#include <dlfcn.h>
#include <execinfo.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <string>
#include <utility>

#include "state.h"

namespace emu {

namespace {

// The kernel's source lines behind an address of this library, by addr2line where it is installed; inlined callers included.
std::string find_lines(const void* address) {
    Dl_info info;
    if (!dladdr(address, &info) || !info.dli_fname) return "";
    // A return address points behind the call.
    const size_t offset = static_cast<size_t>(static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase)) - 1;
    char command[1024];
    snprintf(command, sizeof command, "LD_PRELOAD= LD_LIBRARY_PATH= addr2line -Cfpie '%s' 0x%zx 2>&1", info.dli_fname, offset);
    std::string text;
    FILE* pipe = popen(command, "r");
    if (!pipe) return "";
    char line[1024];
    while (fgets(line, sizeof line, pipe)) {
        // The emulator's own files say nothing about the kernel; its tests do.
        if (strstr(line, "??") || (strstr(line, "/emulator/") && !strstr(line, "/selftest/")) || !strstr(line, "kernels/")) continue;
        const char* name = strncmp(line, " (inlined by) ", 14) == 0 ? line + 14 : line;
        const char* at = strstr(name, " at ");
        const char* path = at ? strstr(at, "kernels/") : nullptr;
        if (!path) continue;
        // Without the parameter list.
        std::string function(name, static_cast<size_t>(at - name));
        text += (text.empty() ? "" : " <- ") + function.substr(0, function.find('(')) + " " + path;
        while (!text.empty() && text.back() == '\n') text.pop_back();
    }
    pclose(pipe);
    return text;
}

const std::string& source_lines(const void* address) {
    static thread_local std::map<const void*, std::string> known;
    auto found = known.find(address);
    if (found == known.end()) found = known.emplace(address, find_lines(address)).first;
    return found->second;
}

}  // namespace

// Return addresses of a parked thread, innermost first. Reads frames as raw memory.
__attribute__((no_sanitize("address", "alignment"))) static int walk(const Fiber& fiber, const void** addresses, int limit) {
    int count = 0;
#if defined(__x86_64__)
    // What switch_context saved: r15 r14 r13 r12 rbx rbp, the return address; then the chain of frame pointers.
    void* const* frame = static_cast<void* const*>(static_cast<void* const*>(fiber.context.stack_pointer)[5]);
    const char *low = fiber.context.stack, *high = low + fiber.context.stack_bytes - 16;
    while (count < limit && reinterpret_cast<const char*>(frame) >= low && reinterpret_cast<const char*>(frame) <= high) {
        addresses[count++] = frame[1];
        low = reinterpret_cast<const char*>(frame) + 1;  // frames only go up
        frame = static_cast<void* const*>(frame[0]);
    }
#else
    (void)fiber, (void)addresses, (void)limit;
#endif
    return count;
}

std::string describe_place(const Fiber& fiber) {
    if (&fiber == self) return "";  // not suspended; the report begins with it
    const void* addresses[16];
    const int count = walk(fiber, addresses, 16);
    for (int i = 0; i < count; ++i) {
        const std::string& lines = source_lines(addresses[i]);
        if (!lines.empty()) return "in " + lines;
    }
    return "";
}

std::string describe_position() {
    if (!self) return "cuda emulator: after the last thread: ";
    const Fiber& f = *current();
    char head[400];
    snprintf(head, sizeof head, "cuda emulator: kernel %s, block (%u, %u, %u), thread (%u, %u, %u) = warp %u lane %u:\n", f.cluster->kernel->name,
             f.block.x, f.block.y, f.block.z, f.thread.x, f.thread.y, f.thread.z, f.linear / 32, f.lane);
    std::string text = head;
    void* frames[24];
    const int count = backtrace(frames, 24);
    for (int i = 2; i < count; ++i) {
        const std::string& lines = source_lines(frames[i]);
        if (!lines.empty()) text += "  in " + lines + "\n";
    }
    return text;
}

std::string describe_threads(const Cluster& cluster) {
    // Threads of a warp that wait for the same at the same place make one line.
    std::map<std::pair<uint32_t, std::string>, uint32_t> lines;
    for (const Warp* warp : cluster.warps) {
        for (uint32_t lanes = warp->alive; lanes; lanes &= lanes - 1) {
            const Fiber& f = *warp->fibers[__builtin_ctz(lanes)];
            std::string what = "is running";
            if (f.state == State::Waiting) {
                char text[256];
                snprintf(text, sizeof text, f.wait.what, static_cast<unsigned long long>(f.wait.first),
                         static_cast<unsigned long long>(f.wait.second));
                what = std::string("waits: ") + text;
                if (strncmp(f.wait.what, "mbarrier", 8) == 0) what += " (" + describe_mbarrier(f.wait.object) + ")";
                what += " " + describe_place(f);
            }
            lines[{warp->index, what}] |= lanes & -lanes;
        }
    }
    std::string text;
    size_t shown = 0;
    for (const auto& [key, lanes] : lines) {
        if (++shown > 24) {
            text += "  ... and " + std::to_string(lines.size() - 24) + " more\n";
            break;
        }
        const Warp& warp = *cluster.warps[key.first];
        char head[128];
        snprintf(head, sizeof head, "  block (%u, %u, %u) warp %zu lanes 0x%08x ", warp.block->index.x, warp.block->index.y, warp.block->index.z,
                 key.first % warp.block->warps.size(), lanes);
        text += head + key.second + "\n";
    }
    uint32_t ended = 0;
    for (const Block* block : cluster.blocks) {
        const Fiber& any = *block->warps[0]->fibers[0];
        ended += any.block_dim.x * any.block_dim.y * any.block_dim.z - block->alive;
    }
    if (ended) text += "  " + std::to_string(ended) + " threads have ended\n";
    return text;
}

}  // namespace emu
