// The functions of `include/ptx/*.cuh` for the CPU: the same names, operands and checks of what the hardware demands.
// Their documentation is there; here stands only what the emulation adds.
#pragma once

#include "engine.h"
#include "ptx_memory.h"
#include "ptx_sm80.h"
#include "ptx_sm90.h"
