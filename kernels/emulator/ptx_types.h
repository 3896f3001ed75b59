// Declarations of ptx.h for the emulator's own files.
#pragma once

#include "../include/ptx.cuh"
