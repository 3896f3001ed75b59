// Kernels by name, for the driver.
#pragma once

#include "engine.h"

namespace emu {

// Null if no kernel of that name was compiled into the library.
const Kernel* find_kernel(const char* name);

}  // namespace emu
