// The emulator's own tests: kernels of `*.cu` here, run by the engine directly, compared with plain loops.
#pragma once

#include <stdint.h>

#include <functional>
#include <string>
#include <vector>

namespace selftest {

struct Shape {
    unsigned blocks = 1, threads = 32, shared_bytes = 0, cluster = 1;
};

// Runs kernel `name` with one parameter structure, and tensor maps of 128 bytes each for its other parameters. The report
// of what went wrong, or "".
std::string run(const char* name, const Shape& shape, const void* parameters, uint64_t seed, const void* maps = nullptr);

// Registers a test. It reports by `expect`.
struct Test {
    Test(const char* name, std::function<void()> body);
};

void expect(bool condition, const char* what, uint64_t seed = 0);
// The report must contain `text`.
void expect_report(const std::string& report, const char* text);

// True if `body` ends its process with a report of AddressSanitizer. Without the sanitizer: true, after a note.
bool sanitizer_stops(const std::function<void()>& body);

constexpr uint64_t kSeeds = 24;  // each test runs under the seeds 0 .. kSeeds - 1

// Deterministic values in [-1, 1) that are exact in bf16.
float value(uint32_t index);

}  // namespace selftest
