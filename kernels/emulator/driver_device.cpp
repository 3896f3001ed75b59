// Initialisation, the device and its attributes, contexts, error names.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"

namespace driver {

static uint64_t variable(const char* name, uint64_t otherwise) {
    const char* text = getenv(name);
    return text && *text ? strtoull(text, nullptr, 0) : otherwise;
}

const Settings& settings() {
    static const Settings all = {static_cast<int>(variable("MOE_EMULATED_SM", 90)), static_cast<int>(variable("MOE_EMULATED_SMS", 8)),
                                 static_cast<int>(variable("MOE_EMULATED_DRIVER", 13000)), variable("MOE_EMULATED_SEED", 1),
                                 variable("MOE_EMULATED_MEMORY", 16ull << 30), variable("MOE_EMULATED_ABORT", 0) != 0};
    return all;
}

static bool data_centre() { return settings().sm == 80 || settings().sm == 90 || settings().sm == 100; }

static size_t shared_per_multiprocessor() {
    if (settings().sm >= 90 && data_centre()) return 233472;
    return data_centre() ? 167936 : 102400;
}

size_t shared_optin() { return shared_per_multiprocessor() - 1024; }

void explain(const char* format, ...) {
    char text[4096];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fprintf(stderr, "cuda emulator: %s\n", text);
}

static bool initialised = false;
static Context primary;
static thread_local CUcontext current_context = nullptr;

static int attribute(int number) {
    const bool big = data_centre();
    switch (number) {
        case 1: return static_cast<int>(1024);                                 // MAX_THREADS_PER_BLOCK
        case 2: case 3: return static_cast<int>(1024);                         // MAX_BLOCK_DIM_X, Y
        case 4: return static_cast<int>(64);                                   // MAX_BLOCK_DIM_Z
        case 5: return static_cast<int>(2147483647);                           // MAX_GRID_DIM_X
        case 6: case 7: return static_cast<int>(65535);                        // MAX_GRID_DIM_Y, Z
        case 8: return static_cast<int>(49152);                                // MAX_SHARED_MEMORY_PER_BLOCK
        case 9: return static_cast<int>(65536);                                // TOTAL_CONSTANT_MEMORY
        case 10: return static_cast<int>(32);                                  // WARP_SIZE
        case 12: case 82: return static_cast<int>(65536);                      // MAX_REGISTERS_PER_BLOCK, _MULTIPROCESSOR
        case 13: return static_cast<int>(1755000);                             // CLOCK_RATE, kHz
        case 16: return static_cast<int>(settings().sm_count);                 // MULTIPROCESSOR_COUNT
        case 31: case 41: case 78: case 95: case 115: return static_cast<int>(1);  // concurrent kernels, unified addressing, priorities, cooperative, pools
        case 36: return static_cast<int>(2619000);                             // MEMORY_CLOCK_RATE, kHz
        case 37: return static_cast<int>(5120);                                // GLOBAL_MEMORY_BUS_WIDTH
        case 38: return static_cast<int>(50 << 20);                            // L2_CACHE_SIZE
        case 39: return static_cast<int>(big ? 2048 : 1536);                   // MAX_THREADS_PER_MULTIPROCESSOR
        case 40: return static_cast<int>(3);                                   // ASYNC_ENGINE_COUNT
        case 75: return static_cast<int>(settings().sm / 10);                  // COMPUTE_CAPABILITY_MAJOR
        case 76: return static_cast<int>(settings().sm % 10);                  // COMPUTE_CAPABILITY_MINOR
        case 81: return static_cast<int>(static_cast<int>(shared_per_multiprocessor()));
        case 97: return static_cast<int>(static_cast<int>(shared_optin()));    // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        case 106: return static_cast<int>(big ? 32 : 16);                      // MAX_BLOCKS_PER_MULTIPROCESSOR
        case 111: return static_cast<int>(1024);                               // RESERVED_SHARED_MEMORY_PER_BLOCK
        case 120: case 127: return static_cast<int>(settings().sm >= 90);      // CLUSTER_LAUNCH, TENSOR_MAP_ACCESS_SUPPORTED
        default: return static_cast<int>(0);
    }
}

}  // namespace driver

using namespace driver;

DRIVER_API cuInit(unsigned flags) {
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    initialised = true;
    return CUDA_SUCCESS;
}

DRIVER_API cuDriverGetVersion(int* version) {
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = settings().version;
    return CUDA_SUCCESS;
}

DRIVER_API cuDeviceGetCount(int* count) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *count = 1;
    return CUDA_SUCCESS;
}

DRIVER_API cuDeviceGet(CUdevice* device, int ordinal) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (ordinal != 0) return CUDA_ERROR_INVALID_DEVICE;
    *device = 0;
    return CUDA_SUCCESS;
}

DRIVER_API cuDeviceGetName(char* name, int length, CUdevice device) {
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    snprintf(name, static_cast<size_t>(length), "moe-kernels CUDA emulator (sm_%d)", settings().sm);
    return CUDA_SUCCESS;
}

DRIVER_API cuDeviceGetUuid_v2(unsigned char* uuid, CUdevice device) {
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    memcpy(uuid, "moe-emulated-gpu", 16);
    return CUDA_SUCCESS;
}
DRIVER_API cuDeviceGetUuid(unsigned char* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }

DRIVER_API cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = settings().memory;
    return CUDA_SUCCESS;
}

DRIVER_API cuDeviceGetAttribute(int* value, int number, CUdevice device) {
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    *value = attribute(number);
    return CUDA_SUCCESS;
}

// ---- contexts: the primary one ----

DRIVER_API cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    *context = &primary;
    return CUDA_SUCCESS;
}
DRIVER_API cuDevicePrimaryCtxRelease_v2(CUdevice device) { return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE; }

DRIVER_API cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

DRIVER_API cuCtxCreate_v4(CUcontext* context, void*, unsigned, CUdevice device) {
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    current_context = *context = new Context;
    return CUDA_SUCCESS;
}
DRIVER_API cuCtxCreate_v2(CUcontext* context, unsigned flags, CUdevice device) { return cuCtxCreate_v4(context, nullptr, flags, device); }

DRIVER_API cuCtxDestroy_v2(CUcontext context) {
    if (!context || context == &primary) return CUDA_ERROR_INVALID_CONTEXT;
    if (current_context == context) current_context = nullptr;
    delete context;
    return CUDA_SUCCESS;
}

DRIVER_API cuCtxGetCurrent(CUcontext* context) {
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *context = current_context;
    return CUDA_SUCCESS;
}
DRIVER_API cuCtxSetCurrent(CUcontext context) {
    current_context = context;
    return CUDA_SUCCESS;
}
DRIVER_API cuCtxPushCurrent_v2(CUcontext context) { return cuCtxSetCurrent(context); }
DRIVER_API cuCtxPopCurrent_v2(CUcontext* context) {
    if (context) *context = current_context;
    current_context = nullptr;
    return CUDA_SUCCESS;
}
DRIVER_API cuCtxGetDevice(CUdevice* device) {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    *device = 0;
    return CUDA_SUCCESS;
}
DRIVER_API cuCtxGetId(CUcontext context, unsigned long long* id) {
    if (!context) context = current_context;
    if (!context) return CUDA_ERROR_INVALID_CONTEXT;
    *id = context == &primary ? 1 : reinterpret_cast<uintptr_t>(context);
    return CUDA_SUCCESS;
}
DRIVER_API cuCtxGetApiVersion(CUcontext, unsigned* version) {
    *version = 3020;
    return CUDA_SUCCESS;
}
DRIVER_API cuCtxSetFlags(unsigned) { return CUDA_SUCCESS; }
DRIVER_API cuCtxGetLimit(size_t* value, int) {
    *value = 1024;
    return CUDA_SUCCESS;
}
DRIVER_API cuCtxSetLimit(int, size_t) { return CUDA_SUCCESS; }
DRIVER_API cuCtxGetCacheConfig(int* config) {
    *config = 0;
    return CUDA_SUCCESS;
}
DRIVER_API cuCtxSetCacheConfig(int) { return CUDA_SUCCESS; }
DRIVER_API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}
DRIVER_API cuCtxSynchronize() {
    if (!current_context) return CUDA_ERROR_INVALID_CONTEXT;
    if (any_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return drain_all();
}
DRIVER_API cuProfilerStart() { return CUDA_SUCCESS; }
DRIVER_API cuProfilerStop() { return CUDA_SUCCESS; }

// ---- errors ----

namespace {
struct ErrorText {
    CUresult code;
    const char *name, *text;
};
#define ERROR_TEXT(code, text) {code, #code, text}
const ErrorText kErrors[] = {
    ERROR_TEXT(CUDA_SUCCESS, "no error"),
    ERROR_TEXT(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ERROR_TEXT(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ERROR_TEXT(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ERROR_TEXT(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    ERROR_TEXT(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    ERROR_TEXT(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    ERROR_TEXT(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    ERROR_TEXT(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    ERROR_TEXT(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed"),
    ERROR_TEXT(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the provided PTX was compiled with an unsupported toolchain."),
    ERROR_TEXT(CUDA_ERROR_FILE_NOT_FOUND, "file not found"),
    ERROR_TEXT(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    ERROR_TEXT(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    ERROR_TEXT(CUDA_ERROR_NOT_READY, "device not ready"),
    ERROR_TEXT(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    ERROR_TEXT(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    ERROR_TEXT(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    ERROR_TEXT(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "operation would result in an unmatched capture"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream"),
    ERROR_TEXT(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "operation would make the legacy stream depend on a capturing blocking stream"),
    ERROR_TEXT(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
    ERROR_TEXT(CUDA_ERROR_INVALID_CLUSTER_SIZE, "cluster misconfiguration"),
};
const ErrorText* error_text(CUresult code) {
    for (const ErrorText& entry : kErrors) {
        if (entry.code == code) return &entry;
    }
    return nullptr;
}
}  // namespace

DRIVER_API cuGetErrorName(CUresult code, const char** text) {
    const ErrorText* entry = error_text(code);
    *text = entry ? entry->name : nullptr;
    return entry ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
DRIVER_API cuGetErrorString(CUresult code, const char** text) {
    const ErrorText* entry = error_text(code);
    *text = entry ? entry->text : nullptr;
    return entry ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
