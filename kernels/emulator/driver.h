// The emulated CUDA driver: handles, streams as queues of tasks, device memory as host memory. Private to driver_*.cpp.
//
// A stream's work is done late: when somebody synchronises, or now and then at random. What the host reads too early, or
// another stream without waiting for an event, is therefore not there yet.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"

#define DRIVER_API extern "C" __attribute__((visibility("default"))) CUresult

// The values of CUresult that can come.
enum CUresult : int {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_INVALID_PTX = 218,
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222,
    CUDA_ERROR_FILE_NOT_FOUND = 301,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
    CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904,
    CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905,
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
    CUDA_ERROR_CAPTURED_EVENT = 907,
    CUDA_ERROR_INVALID_CLUSTER_SIZE = 912,
};

using CUdevice = int;
using CUdeviceptr = uint64_t;

struct Context {
    int device = 0;
};

// What a stream does at one point: returns an error that then sticks to the stream.
using Task = std::function<CUresult()>;

struct Graph {
    std::vector<Task> tasks;
    int open_streams = 0;  // captures that have not joined
    bool invalid = false;
};

struct Stream;

struct Event {
    Stream* stream = nullptr;  // where it was recorded last; null: never
    uint64_t ticket = 0;       // position there
    double milliseconds = 0;
    bool timing = true;
    std::shared_ptr<Graph> graph;  // recorded during that capture
};

struct Stream {
    std::deque<Task> queue;
    uint64_t submitted = 0, finished = 0;
    bool busy = false;
    bool blocking = true;  // orders itself with the null stream
    CUresult error = CUDA_SUCCESS;
    std::shared_ptr<Graph> capture;
    bool capture_origin = false;
};

using CUcontext = Context*;
using CUstream = Stream*;
using CUevent = Event*;
using CUgraph = std::shared_ptr<Graph>*;
using CUgraphExec = std::vector<Task>*;

namespace driver {

// ---- settings, from the environment ----

struct Settings {
    int sm;             // MOE_EMULATED_SM: 80, 86, 89, 90 (default), 100, 120
    int sm_count;       // MOE_EMULATED_SMS: 8 by default
    int version;        // MOE_EMULATED_DRIVER: as cuDriverGetVersion gives it, 13000 by default
    uint64_t seed;      // MOE_EMULATED_SEED: 1 by default; 0 runs everything in order
    uint64_t memory;    // MOE_EMULATED_MEMORY: bytes of device memory, 16 GiB by default
    bool abort_on_failure;  // MOE_EMULATED_ABORT=1
};
const Settings& settings();
size_t shared_optin();  // bytes of shared memory a block can have

// A line on stderr that explains an error that is about to be returned.
void explain(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- streams ----

// The stream behind a handle: null, 1 (legacy) and 2 (per thread) included. Null if there is none.
Stream* resolve(CUstream handle);
// Appends work, or records it if the stream captures.
CUresult submit(CUstream handle, Task task);
CUresult drain(Stream* stream);
CUresult drain_all();
// Drains the null stream and those that order themselves with it.
CUresult drain_legacy();
bool any_capture();
bool capturing(CUstream handle);

// ---- memory ----

// True if [address, address + bytes) lies in one allocation.
bool is_device_memory(CUdeviceptr address, size_t bytes);
// True if the address is mapped host memory outside of all allocations.
bool looks_like_host_memory(uint64_t address);

}  // namespace driver
