// Reports: which thread, which line of the kernel, who waits where.
#include <dlfcn.h>
#include <execinfo.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <tuple>

#include "state.h"

namespace emu {

// Source lines of an address inside this library, by addr2line where it is installed; inlined callers included.
static std::string source_lines(const void* address, const char* indent) {
    Dl_info info;
    if (!dladdr(address, &info) || !info.dli_fname) return "";
    // A return address points behind the call.
    const size_t offset = static_cast<size_t>(static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase)) - 1;
    char command[1024];
    snprintf(command, sizeof command, "LD_PRELOAD= LD_LIBRARY_PATH= addr2line -Cfpise '%s' 0x%zx 2>&1", info.dli_fname, offset);
    std::string text;
    if (FILE* pipe = popen(command, "r")) {
        char line[512];
        while (fgets(line, sizeof line, pipe)) {
            // The emulator's own wrappers say nothing about the kernel.
            if (strstr(line, "??") || strstr(line, "emulator") || strstr(line, " cuda.h:") || strstr(line, " ptx.h:")) continue;
            if (strstr(line, "engine.h:") || strstr(line, "scheduler.cpp") || strstr(line, "async.cpp")) continue;
            text += indent;
            text += line[0] == ' ' ? line + 1 : line;
        }
        pclose(pipe);
    }
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
}

std::string describe_caller(const void* address) {
    if (!address) return "?";
    std::string lines = source_lines(address, " ");
    for (char& c : lines) {
        if (c == '\n') c = ',';
    }
    if (!lines.empty()) return "at" + lines;
    char text[64];
    snprintf(text, sizeof text, "at %p", address);
    return text;
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
        const std::string lines = source_lines(frames[i], "  in ");
        if (!lines.empty()) text += lines + "\n";
    }
    return text;
}

std::string describe_threads(const Cluster& cluster) {
    // Threads of a warp that wait for the same at the same place make one line.
    struct Key {
        uint32_t warp;
        const char* what;
        uint64_t first, second;
        const void *object, *caller;
        bool operator<(const Key& o) const {
            return std::tie(warp, what, first, second, object, caller) < std::tie(o.warp, o.what, o.first, o.second, o.object, o.caller);
        }
    };
    std::map<Key, uint32_t> lines;
    for (const Warp* warp : cluster.warps) {
        for (uint32_t lanes = warp->alive; lanes; lanes &= lanes - 1) {
            const Fiber& f = *warp->fibers[__builtin_ctz(lanes)];
            const bool waits = f.state == State::Waiting;
            lines[{warp->index, waits ? f.wait.what : "runs", waits ? f.wait.first : 0, waits ? f.wait.second : 0,
                   waits ? f.wait.object : nullptr, waits ? f.wait.caller : nullptr}] |= lanes & -lanes;
        }
    }
    std::string text;
    int shown = 0;
    for (const auto& [key, lanes] : lines) {
        if (++shown > 24) return text + "  ... " + std::to_string(lines.size() - 24) + " more\n";
        const Warp& warp = *cluster.warps[key.warp];
        char head[128], what[256];
        snprintf(head, sizeof head, "  block (%u, %u, %u) warp %zu lanes 0x%08x: ", warp.block->index.x, warp.block->index.y, warp.block->index.z,
                 key.warp % warp.block->warps.size(), lanes);
        snprintf(what, sizeof what, key.what, static_cast<unsigned long long>(key.first), static_cast<unsigned long long>(key.second));
        text += std::string(head) + what + " " + (key.caller ? describe_caller(key.caller) : "");
        if (strncmp(key.what, "mbarrier", 8) == 0) text += "; " + describe_mbarrier(key.object);
        text += "\n";
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
