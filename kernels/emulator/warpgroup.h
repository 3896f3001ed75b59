// The products under way in a warpgroup.
#pragma once

#include "state.h"

namespace emu {
struct Warpgroup {};
}  // namespace emu
