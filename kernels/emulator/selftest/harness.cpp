#include "harness.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../registry.h"
#include "../state.h"

namespace selftest {

struct Registered {
    const char* name;
    std::function<void()> body;
};

static std::vector<Registered>& tests() {
    static std::vector<Registered> all;
    return all;
}

static int failures = 0, checks = 0;

Test::Test(const char* name, std::function<void()> body) { tests().push_back({name, std::move(body)}); }

void expect(bool condition, const char* what, uint64_t seed) {
    ++checks;
    if (condition) return;
    if (++failures <= 20) printf("    FAILED (seed %llu): %s\n", static_cast<unsigned long long>(seed), what);
}

void expect_report(const std::string& report, const char* text) {
    ++checks;
    if (report.find(text) != std::string::npos) return;
    ++failures;
    printf("    FAILED: a report with \"%s\" was expected; it was: \"%s\"\n", text, report.c_str());
}

std::string run(const char* name, const Shape& shape, const void* parameters, uint64_t seed, const void* maps) {
    const emu::Kernel* kernel = emu::find_kernel(name);
    if (!kernel) return std::string("no kernel ") + name;
    void* arguments[8] = {const_cast<void*>(parameters)};
    for (uint32_t i = 1; i < kernel->argument_count; ++i) arguments[i] = static_cast<char*>(const_cast<void*>(maps)) + 128 * (i - 1);
    const emu::LaunchShape launch = {{shape.blocks, 1, 1}, {shape.threads, 1, 1}, {shape.cluster, 1, 1}, shape.shared_bytes};
    return emu::run_grid(*kernel, launch, arguments, seed);
}

bool sanitizer_stops(const std::function<void()>& body) {
#if EMU_ASAN
    int ends[2];
    if (pipe(ends) != 0) return false;
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        body();
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char part[4096];
    for (ssize_t got; (got = read(ends[0], part, sizeof part)) > 0;) text.append(part, static_cast<size_t>(got));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    const bool reported = text.find("AddressSanitizer") != std::string::npos || text.find("out of bounds") != std::string::npos;
    return status != 0 && reported;
#else
    (void)body;
    printf("    not run: needs AddressSanitizer (scripts/emulate-cuda.sh --asan --selftest)\n");
    return true;
#endif
}

float value(uint32_t index) {
    const uint32_t hash = (index * 2654435761u) ^ (index >> 7);
    return static_cast<float>(static_cast<int>(hash >> 9 & 127) - 64) / 64.0f;
}

}  // namespace selftest

int main(int count, char** arguments) {
    using namespace selftest;
    for (const Registered& test : tests()) {
        if (count > 1 && !strstr(test.name, arguments[1])) continue;
        const int before = failures;
        test.body();
        printf("%s %s\n", failures == before ? "ok  " : "FAIL", test.name);
        fflush(stdout);
    }
    printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
