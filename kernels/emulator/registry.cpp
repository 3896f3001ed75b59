// The kernels of this library by name.
#include <string.h>

#include <vector>

#include "registry.h"

namespace emu {

static std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

void register_kernel(const Kernel& kernel) { kernels().push_back(kernel); }

const Kernel* find_kernel(const char* name) {
    for (const Kernel& kernel : kernels()) {
        if (strcmp(kernel.name, name) == 0) return &kernel;
    }
    return nullptr;
}

}  // namespace emu
