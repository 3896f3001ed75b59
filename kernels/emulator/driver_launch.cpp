// Modules from PTX text, functions, launches, tensor maps. The PTX says which kernels there are, for which GPU, with which
// parameters and how many threads at most; what runs is the C++ of the same source.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>

#include "driver.h"
#include "registry.h"
#include "state.h"
#include "tensor_map.h"

struct CUfunction_st {
    std::string name;
    const emu::Kernel* kernel = nullptr;
    std::vector<uint32_t> parameter_bytes;
    uint32_t max_threads = 1024;
    size_t max_dynamic = 48 * 1024;
    bool non_portable_cluster = false;
};
using CUfunction = CUfunction_st*;

struct CUmodule_st {
    std::map<std::string, CUfunction_st> functions;
};
using CUmodule = CUmodule_st*;

using namespace driver;

// ---- modules ----

namespace {

// Bytes of one `.param` declaration, such as `.param .align 8 .b8 name[16]` or `.param .u64 name`.
uint32_t parameter_bytes(const std::string& declaration) {
    const size_t bracket = declaration.find('[');
    if (bracket != std::string::npos) return static_cast<uint32_t>(strtoul(declaration.c_str() + bracket + 1, nullptr, 10));
    for (const char* type : {".u64", ".s64", ".b64", ".f64"}) {
        if (declaration.find(type) != std::string::npos) return 8;
    }
    for (const char* type : {".u16", ".s16", ".b16"}) {
        if (declaration.find(type) != std::string::npos) return 2;
    }
    return declaration.find("8 ") != std::string::npos ? 1 : 4;
}

// Reads `.entry name( parameters ) directives {` from `at` on.
CUfunction_st parse_entry(const std::string& ptx, size_t at) {
    CUfunction_st function;
    const size_t open = ptx.find('(', at), body = ptx.find('{', at);
    size_t begin = ptx.find_first_not_of(" \t\n", at);
    size_t end = ptx.find_first_of(" \t\n({", begin);
    function.name = ptx.substr(begin, end - begin);
    size_t close = open;
    if (open != std::string::npos && open < body) {
        close = ptx.find(')', open);
        for (size_t p = ptx.find(".param", open); p != std::string::npos && p < close; p = ptx.find(".param", p + 1)) {
            function.parameter_bytes.push_back(parameter_bytes(ptx.substr(p, ptx.find_first_of(",)", p) - p)));
        }
    } else {
        close = end;
    }
    const std::string directives = ptx.substr(close, body - close);
    const size_t threads = directives.find(".maxntid");
    if (threads != std::string::npos) {
        unsigned x = 1, y = 1, z = 1;
        sscanf(directives.c_str() + threads, ".maxntid %u, %u, %u", &x, &y, &z);
        function.max_threads = x * y * z;
    }
    return function;
}

CUresult check_target(const std::string& ptx) {
    int major = 0, minor = 0, sm = 0;
    const size_t version = ptx.find(".version"), target = ptx.find(".target");
    if (version == std::string::npos || target == std::string::npos) return CUDA_ERROR_INVALID_IMAGE;
    sscanf(ptx.c_str() + version, ".version %d.%d", &major, &minor);
    // CUDA 11.0 reads PTX 7.0, 12.0 reads 8.0, 13.0 reads 9.0.
    const int newest = (settings().version / 1000 - 4) * 10 + settings().version % 1000 / 10;
    if (major * 10 + minor > newest) {
        explain("cuModuleLoadData: PTX %d.%d is newer than driver %d reads", major, minor, settings().version);
        return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    }
    char suffix = 0;
    sscanf(ptx.c_str() + target, ".target sm_%d%c", &sm, &suffix);
    const bool exact = suffix == 'a';
    if (exact ? sm != settings().sm : sm > settings().sm) {
        explain("cuModuleLoadData: PTX for sm_%d%s cannot run on sm_%d", sm, exact ? "a" : "", settings().sm);
        return CUDA_ERROR_NO_BINARY_FOR_GPU;
    }
    return CUDA_SUCCESS;
}

// Whether the kernel that was compiled into this library is the one that the PTX describes.
bool same_parameters(const CUfunction_st& function) {
    const emu::Kernel& kernel = *function.kernel;
    bool same = kernel.argument_count == function.parameter_bytes.size();
    for (size_t i = 0; same && i < function.parameter_bytes.size(); ++i) same = kernel.argument_bytes[i] == function.parameter_bytes[i];
    if (same) return true;
    std::string ptx, source;
    for (uint32_t bytes : function.parameter_bytes) ptx += " " + std::to_string(bytes);
    for (uint32_t i = 0; i < kernel.argument_count; ++i) source += " " + std::to_string(kernel.argument_bytes[i]);
    explain("kernel %s: parameters of%s bytes in the PTX, of%s in the source: the PTX (or the emulator's library) is out of date",
            kernel.name, ptx.c_str(), source.c_str());
    return false;
}

}  // namespace

DRIVER_API cuModuleLoadData(CUmodule* module, const void* image) {
    if (!module || !image) return CUDA_ERROR_INVALID_VALUE;
    const std::string ptx = static_cast<const char*>(image);
    const CUresult target = check_target(ptx);
    if (target != CUDA_SUCCESS) return target;
    auto loaded = std::make_unique<CUmodule_st>();
    for (size_t at = ptx.find(".entry "); at != std::string::npos; at = ptx.find(".entry ", at + 1)) {
        CUfunction_st function = parse_entry(ptx, at + 6);
        function.kernel = emu::find_kernel(function.name.c_str());
        if (function.kernel && !same_parameters(function)) return CUDA_ERROR_INVALID_PTX;
        loaded->functions[function.name] = function;
    }
    *module = loaded.release();
    return CUDA_SUCCESS;
}
DRIVER_API cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, int*, void**) { return cuModuleLoadData(module, image); }

DRIVER_API cuModuleLoad(CUmodule* module, const char* path) {
    FILE* file = fopen(path, "rb");
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    std::string text;
    char part[4096];
    for (size_t got; (got = fread(part, 1, sizeof part, file)) > 0;) text.append(part, got);
    fclose(file);
    return cuModuleLoadData(module, text.c_str());
}

DRIVER_API cuModuleUnload(CUmodule module) {
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    drain_all();
    delete module;
    return CUDA_SUCCESS;
}

DRIVER_API cuModuleGetLoadingMode(int* mode) {
    *mode = 1;
    return CUDA_SUCCESS;
}

DRIVER_API cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    auto found = module->functions.find(name);
    if (found == module->functions.end()) {
        explain("cuModuleGetFunction: the PTX has no entry %s", name);
        return CUDA_ERROR_NOT_FOUND;
    }
    if (!found->second.kernel) {
        explain("cuModuleGetFunction: %s is in the PTX, but not in this library: MOE_KERNEL(%s) is missing, or the library is out of "
                "date (scripts/emulate-cuda.sh)", name, name);
        return CUDA_ERROR_NOT_FOUND;
    }
    *function = &found->second;
    return CUDA_SUCCESS;
}

DRIVER_API cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char*) { return CUDA_ERROR_NOT_FOUND; }

// ---- functions ----

DRIVER_API cuFuncGetName(const char** name, CUfunction function) {
    *name = function->name.c_str();
    return CUDA_SUCCESS;
}

DRIVER_API cuFuncGetAttribute(int* value, int attribute, CUfunction function) {
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    switch (attribute) {
        case 0: *value = static_cast<int>(function->max_threads); break;
        case 4: *value = 64; break;  // registers: not known here
        case 5: *value = 80; break;
        case 6: *value = settings().sm; break;
        case 8: *value = static_cast<int>(function->max_dynamic); break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

DRIVER_API cuFuncSetAttribute(CUfunction function, int attribute, int value) {
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute == 8) {
        if (value < 0 || static_cast<size_t>(value) > shared_optin()) {
            explain("cuFuncSetAttribute(%s): %d bytes of dynamic shared memory; sm_%d has %zu", function->name.c_str(), value,
                    settings().sm, shared_optin());
            return CUDA_ERROR_INVALID_VALUE;
        }
        function->max_dynamic = static_cast<size_t>(value);
        return CUDA_SUCCESS;
    }
    if (attribute == 14) function->non_portable_cluster = value != 0;
    return attribute == 9 || attribute == 14 || attribute == 15 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
DRIVER_API cuFuncSetCacheConfig(CUfunction, int) { return CUDA_SUCCESS; }

DRIVER_API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t dynamic) {
    if (!function || threads <= 0) return CUDA_ERROR_INVALID_VALUE;
    const int by_threads = 2048 / threads;
    const int by_shared = static_cast<int>((shared_optin() + 1024) / (dynamic + 1024));
    *blocks = static_cast<uint32_t>(threads) > function->max_threads ? 0 : by_threads < by_shared ? by_threads : by_shared;
    return CUDA_SUCCESS;
}
DRIVER_API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction function, int threads, size_t dynamic, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, dynamic);
}

// ---- launches ----

struct CUlaunchAttribute {
    int id;
    char pad[4];
    union {
        char bytes[64];
        struct {
            unsigned x, y, z;
        } cluster;
        int flag;
    } value;
};

struct CUlaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    CUstream stream;
    CUlaunchAttribute* attributes;
    unsigned attribute_count;
};

static CUresult check_launch(const CUfunction_st& f, const emu::LaunchShape& s) {
    const uint64_t threads = uint64_t(s.block.x) * s.block.y * s.block.z;
    const char* name = f.name.c_str();
    if (threads == 0 || s.block.x > 1024 || s.block.y > 1024 || s.block.z > 64 || threads > f.max_threads) {
        explain("%s: a block of %u x %u x %u threads; __launch_bounds__ allows %u", name, s.block.x, s.block.y, s.block.z, f.max_threads);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (s.grid.x == 0 || s.grid.y == 0 || s.grid.z == 0 || s.grid.x > 0x7fffffff || s.grid.y > 65535 || s.grid.z > 65535) {
        explain("%s: a grid of %u x %u x %u blocks; 1 to 2147483647 x 65535 x 65535 are possible", name, s.grid.x, s.grid.y, s.grid.z);
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (s.dynamic_bytes > f.max_dynamic) {
        explain("%s: %zu bytes of dynamic shared memory, while %zu are allowed (cuFuncSetAttribute)", name, s.dynamic_bytes, f.max_dynamic);
        return CUDA_ERROR_INVALID_VALUE;
    }
    const uint64_t blocks = uint64_t(s.cluster.x) * s.cluster.y * s.cluster.z;
    if (blocks == 1) return CUDA_SUCCESS;
    if (settings().sm < 90 || blocks == 0 || blocks > (f.non_portable_cluster ? 16u : 8u) || s.grid.x % s.cluster.x || s.grid.y % s.cluster.y ||
        s.grid.z % s.cluster.z) {
        explain("%s: clusters of %u x %u x %u in a grid of %u x %u x %u: at most 8 blocks, each side a divisor, sm_90 or later", name,
                s.cluster.x, s.cluster.y, s.cluster.z, s.grid.x, s.grid.y, s.grid.z);
        return CUDA_ERROR_INVALID_CLUSTER_SIZE;
    }
    return CUDA_SUCCESS;
}

// The arguments, copied at the launch as the driver does, at addresses aligned for tensor maps.
struct Arguments {
    std::vector<unsigned char> bytes;
    std::vector<void*> pointers;

    Arguments(const emu::Kernel& kernel, void* const* given) {
        size_t total = 64;
        for (uint32_t i = 0; i < kernel.argument_count; ++i) total += (kernel.argument_bytes[i] + 63) / 64 * 64;
        bytes.resize(total);
        unsigned char* next = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
        for (uint32_t i = 0; i < kernel.argument_count; next += (kernel.argument_bytes[i++] + 63) / 64 * 64) {
            memcpy(next, given[i], kernel.argument_bytes[i]);
            pointers.push_back(next);
        }
    }
    Arguments(const Arguments&) = delete;
};

static CUresult check_arguments(const emu::Kernel& kernel, const Arguments& arguments) {
    for (uint32_t i = 0; i < kernel.argument_count; ++i) {
        for (uint32_t offset = 0; offset + 8 <= kernel.argument_bytes[i]; offset += 8) {
            uint64_t word;
            memcpy(&word, static_cast<const char*>(arguments.pointers[i]) + offset, 8);
            if (!looks_like_host_memory(word)) continue;
            explain("%s: parameter %u holds at offset %u the host address 0x%llx, not one of device memory", kernel.name, i, offset,
                    static_cast<unsigned long long>(word));
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        }
    }
    return CUDA_SUCCESS;
}

static uint64_t launch_seed(const emu::Kernel& kernel, uint64_t ordinal) {
    if (settings().seed == 0) return 0;
    uint64_t hash = settings().seed * 0x9e3779b97f4a7c15ull + ordinal;
    for (const char* c = kernel.name; *c; ++c) hash = (hash ^ static_cast<unsigned char>(*c)) * 0x100000001b3ull;
    return hash | 1;
}

static CUresult launch(CUfunction function, const emu::LaunchShape& shape, CUstream stream, void** parameters, void** extra) {
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (extra || (!parameters && function->kernel->argument_count)) return CUDA_ERROR_INVALID_VALUE;
    const CUresult check = check_launch(*function, shape);
    if (check != CUDA_SUCCESS) return check;
    const emu::Kernel* kernel = function->kernel;
    auto arguments = std::make_shared<Arguments>(*kernel, parameters);
    return submit(stream, [=]() -> CUresult {
        const CUresult check = check_arguments(*kernel, *arguments);
        if (check != CUDA_SUCCESS) return check;
        static thread_local uint64_t launches = 0;
        const uint64_t seed = launch_seed(*kernel, ++launches);
        const std::string report = emu::run_grid(*kernel, shape, arguments->pointers.data(), seed);
        if (report.empty()) return CUDA_SUCCESS;
        fprintf(stderr, "%s\n  (MOE_EMULATED_SEED=%llu, launch %llu of this thread)\n", report.c_str(),
                static_cast<unsigned long long>(settings().seed), static_cast<unsigned long long>(launches));
        if (settings().abort_on_failure) abort();
        return CUDA_ERROR_LAUNCH_FAILED;
    });
}

DRIVER_API cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                          unsigned block_z, unsigned shared_bytes, CUstream stream, void** parameters, void** extra) {
    return launch(function, {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, {1, 1, 1}, shared_bytes}, stream, parameters, extra);
}

DRIVER_API cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
    if (!config) return CUDA_ERROR_INVALID_VALUE;
    emu::LaunchShape shape = {{config->grid_x, config->grid_y, config->grid_z}, {config->block_x, config->block_y, config->block_z}, {1, 1, 1},
                              config->shared_bytes};
    for (unsigned i = 0; i < config->attribute_count; ++i) {
        const CUlaunchAttribute& attribute = config->attributes[i];
        if (attribute.id == 4) shape.cluster = {attribute.value.cluster.x, attribute.value.cluster.y, attribute.value.cluster.z};
        if (attribute.id == 2 && attribute.value.flag) {
            explain("%s: cooperative launches are not emulated: blocks run one after another", function ? function->name.c_str() : "?");
            return CUDA_ERROR_NOT_SUPPORTED;
        }
    }
    return launch(function, shape, config->stream, parameters, extra);
}

DRIVER_API cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig*) {
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    *clusters = settings().sm_count;
    return CUDA_SUCCESS;
}

// ---- tensor maps ----

DRIVER_API cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* dims, const uint64_t* strides,
                                  const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int promotion,
                                  int fill) {
    static const uint8_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    auto refuse = [](const char* what, uint64_t value, unsigned index) {
        explain("cuTensorMapEncodeTiled: %s (dimension %u: %llu)", what, index, static_cast<unsigned long long>(value));
        return CUDA_ERROR_INVALID_VALUE;
    };
    if (!map || !address || !dims || !box || !element_strides || type < 0 || type > 12) return refuse("a null pointer or unknown type", 0, 0);
    if (reinterpret_cast<uintptr_t>(map) % 64) return refuse("the map is not aligned to 64 bytes", 0, 0);
    if (settings().sm < 90) return CUDA_ERROR_NOT_SUPPORTED;
    if (rank < 1 || rank > 5) return refuse("the rank must be 1 to 5", rank, 0);
    if (interleave != 0) return refuse("interleaved layouts are not emulated", static_cast<uint64_t>(interleave), 0);
    if (reinterpret_cast<uintptr_t>(address) % 16) return refuse("the address is not a multiple of 16", reinterpret_cast<uintptr_t>(address), 0);
    if (swizzle < 0 || swizzle > 3 || promotion < 0 || promotion > 3 || fill < 0 || fill > 1) return refuse("unknown mode", 0, 0);
    emu::EncodedMap encoded = {};
    encoded.magic = emu::kTensorMapMagic;
    encoded.element_bytes = kBytes[type];
    encoded.rank = static_cast<uint8_t>(rank);
    encoded.swizzle = static_cast<uint8_t>(swizzle);
    encoded.nan_fill = static_cast<uint8_t>(fill);
    encoded.address = reinterpret_cast<uintptr_t>(address);
    for (unsigned i = 0; i < rank; ++i) {
        if (dims[i] == 0 || dims[i] > (1ull << 32)) return refuse("a dimension must be 1 to 2^32", dims[i], i);
        if (box[i] == 0 || box[i] > 256) return refuse("a box side must be 1 to 256", box[i], i);
        if (element_strides[i] != 1) return refuse("element strides other than 1 are not emulated", element_strides[i], i);
        encoded.last_index[i] = static_cast<uint32_t>(dims[i] - 1);
        encoded.box[i] = static_cast<uint16_t>(box[i]);
        if (i == 0) continue;
        if (strides[i - 1] % 16 || strides[i - 1] >= (1ull << 40)) return refuse("a stride must be a multiple of 16 below 2^40", strides[i - 1], i);
        encoded.strides[i - 1] = strides[i - 1];
    }
    const uint32_t inner = box[0] * kBytes[type];
    if (inner % 16) return refuse("the box's inner side must be a multiple of 16 bytes", inner, 0);
    if (swizzle != 0 && inner > 16u << swizzle) return refuse("the box's inner side is longer than the swizzle", inner, 0);
    memcpy(map, &encoded, sizeof encoded);
    return CUDA_SUCCESS;
}

// The addresses of driver functions by name, for loaders that ask for them this way.
DRIVER_API cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* status) {
    Dl_info info;
    void* self = dladdr(reinterpret_cast<void*>(&cuLaunchKernelEx), &info) ? dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD) : nullptr;
    *function = self ? dlsym(self, (std::string(symbol) + "_v2").c_str()) : nullptr;
    if (!*function && self) *function = dlsym(self, symbol);
    if (status) *status = *function ? 0 : 1;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
