// Device memory: host memory of the exact size, so that AddressSanitizer bounds it; filled with poison; without the
// sanitizer a zone behind each allocation shows what wrote past its end when it is freed.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>

#include "driver.h"

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kZone = 0;
#else
constexpr size_t kZone = 256;
#endif

namespace driver {

namespace {

constexpr unsigned char kFresh = 0xff, kZoneByte = 0xa5;

struct Memory {
    std::mutex mutex;
    std::map<CUdeviceptr, size_t> allocations;
    std::map<CUdeviceptr, size_t> pinned;
    uint64_t used = 0;
};

Memory& memory() {
    static Memory* instance = new Memory;
    return *instance;
}

bool contains(const std::map<CUdeviceptr, size_t>& ranges, CUdeviceptr address, size_t bytes) {
    auto next = ranges.upper_bound(address);
    if (next == ranges.begin()) return false;
    --next;
    return address - next->first <= next->second && bytes <= next->second - (address - next->first);
}

CUresult allocate(CUdeviceptr* address, size_t bytes) {
    if (bytes == 0 || !address) return CUDA_ERROR_INVALID_VALUE;
    Memory& all = memory();
    std::lock_guard<std::mutex> lock(all.mutex);
    void* pointer = nullptr;
    if (bytes > settings().memory - all.used || posix_memalign(&pointer, 256, bytes + kZone) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
    memset(pointer, kFresh, bytes);
    memset(static_cast<char*>(pointer) + bytes, kZoneByte, kZone);
    *address = reinterpret_cast<uintptr_t>(pointer);
    all.allocations[*address] = bytes;
    all.used += bytes;
    return CUDA_SUCCESS;
}

CUresult release(CUdeviceptr address) {
    Memory& all = memory();
    std::lock_guard<std::mutex> lock(all.mutex);
    auto found = all.allocations.find(address);
    if (found == all.allocations.end()) {
        explain("cuMemFree: 0x%llx is no allocation (freed twice, or a view into one)", static_cast<unsigned long long>(address));
        return CUDA_ERROR_INVALID_VALUE;
    }
    const auto* zone = reinterpret_cast<const unsigned char*>(address) + found->second;
    CUresult result = CUDA_SUCCESS;
    for (size_t i = 0; i < kZone; ++i) {
        if (zone[i] == kZoneByte) continue;
        explain("an allocation of %zu bytes was written %zu bytes behind its end", found->second, i + 1);
        result = CUDA_ERROR_ILLEGAL_ADDRESS;
        break;
    }
    all.used -= found->second;
    all.allocations.erase(found);
    free(reinterpret_cast<void*>(address));
    return result;
}

bool is_pinned(const void* host, size_t bytes) {
    std::lock_guard<std::mutex> lock(memory().mutex);
    return contains(memory().pinned, reinterpret_cast<uintptr_t>(host), bytes);
}

CUresult check_device(const char* call, CUdeviceptr address, size_t bytes) {
    if (bytes == 0 || is_device_memory(address, bytes)) return CUDA_SUCCESS;
    explain("%s: [0x%llx, + %zu) is not inside one allocation of device memory", call, static_cast<unsigned long long>(address), bytes);
    return CUDA_ERROR_INVALID_VALUE;
}

// When the task runs the memory may have been freed: on a GPU that is an illegal address.
CUresult check_at_work(const char* call, CUdeviceptr address, size_t bytes) {
    return check_device(call, address, bytes) == CUDA_SUCCESS ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

void* host(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

}  // namespace

bool is_device_memory(CUdeviceptr address, size_t bytes) {
    std::lock_guard<std::mutex> lock(memory().mutex);
    return contains(memory().allocations, address, bytes);
}

bool looks_like_host_memory(uint64_t address) {
    // Programs, heaps and mappings begin above 2^45. Below lies the sanitizer's shadow, which is mapped, too: two small sizes side by side look like it.
    if (address < (1ull << 45) || is_device_memory(address, 1)) return false;
    {
        std::lock_guard<std::mutex> lock(memory().mutex);
        if (contains(memory().allocations, address, 0) || contains(memory().pinned, address, 0)) return false;
    }
    const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    unsigned char resident;
    return mincore(reinterpret_cast<void*>(address / page * page), 1, &resident) == 0;
}

}  // namespace driver

using namespace driver;

DRIVER_API cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    if (any_capture()) explain("cuMemAlloc while a stream captures: a real driver may refuse it");
    return allocate(address, bytes);
}

DRIVER_API cuMemFree_v2(CUdeviceptr address) {
    if (address == 0) return CUDA_SUCCESS;
    drain_all();
    return release(address);
}

DRIVER_API cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream stream) {
    if (capturing(stream)) {
        explain("cuMemAllocAsync during capture is not emulated: a forward call must not allocate");
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    if (!resolve(stream)) return CUDA_ERROR_INVALID_HANDLE;
    return allocate(address, bytes);
}

DRIVER_API cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    return submit(stream, [address] { return release(address); });
}

DRIVER_API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    std::lock_guard<std::mutex> lock(memory().mutex);
    *total = settings().memory;
    *free_bytes = settings().memory - memory().used;
    return CUDA_SUCCESS;
}

DRIVER_API cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
    std::lock_guard<std::mutex> lock(memory().mutex);
    auto next = memory().allocations.upper_bound(address);
    if (next == memory().allocations.begin() || !contains(memory().allocations, address, 0)) return CUDA_ERROR_NOT_FOUND;
    --next;
    if (base) *base = next->first;
    if (bytes) *bytes = next->second;
    return CUDA_SUCCESS;
}

DRIVER_API cuPointerGetAttribute(void* value, int attribute, CUdeviceptr address) {
    if (!is_device_memory(address, 1)) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case 2: *static_cast<unsigned*>(value) = 2; return CUDA_SUCCESS;  // MEMORY_TYPE: device
        case 3: *static_cast<CUdeviceptr*>(value) = address; return CUDA_SUCCESS;
        case 9: *static_cast<int*>(value) = 0; return CUDA_SUCCESS;
        default: return CUDA_ERROR_NOT_SUPPORTED;
    }
}

// ---- host memory ----

DRIVER_API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    if (bytes == 0 || posix_memalign(pointer, 4096, bytes) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
    std::lock_guard<std::mutex> lock(memory().mutex);
    memory().pinned[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
    return CUDA_SUCCESS;
}
DRIVER_API cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }

DRIVER_API cuMemFreeHost(void* pointer) {
    drain_all();
    std::lock_guard<std::mutex> lock(memory().mutex);
    if (memory().pinned.erase(reinterpret_cast<uintptr_t>(pointer)) == 0) return CUDA_ERROR_INVALID_VALUE;
    free(pointer);
    return CUDA_SUCCESS;
}

// ---- copies: pageable host memory is read or written before the call returns, pinned memory in stream order ----

DRIVER_API cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void* source, size_t bytes, CUstream stream) {
    const CUresult check = check_device("cuMemcpyHtoDAsync", target, bytes);
    if (check != CUDA_SUCCESS || bytes == 0) return check;
    auto staged = std::make_shared<std::vector<unsigned char>>();
    if (!is_pinned(source, bytes) && !capturing(stream)) {
        const auto* from = static_cast<const unsigned char*>(source);
        staged->assign(from, from + bytes);
    }
    return submit(stream, [=] {
        const CUresult result = check_at_work("cuMemcpyHtoDAsync", target, bytes);
        if (result == CUDA_SUCCESS) memcpy(host(target), staged->empty() ? source : staged->data(), bytes);
        return result;
    });
}

DRIVER_API cuMemcpyDtoHAsync_v2(void* target, CUdeviceptr source, size_t bytes, CUstream stream) {
    const CUresult check = check_device("cuMemcpyDtoHAsync", source, bytes);
    if (check != CUDA_SUCCESS || bytes == 0) return check;
    const CUresult result = submit(stream, [=] {
        const CUresult result = check_at_work("cuMemcpyDtoHAsync", source, bytes);
        if (result == CUDA_SUCCESS) memcpy(target, host(source), bytes);
        return result;
    });
    if (result != CUDA_SUCCESS || is_pinned(target, bytes) || capturing(stream)) return result;
    return drain(resolve(stream));
}

DRIVER_API cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
    CUresult check = check_device("cuMemcpyDtoDAsync target", target, bytes);
    if (check == CUDA_SUCCESS) check = check_device("cuMemcpyDtoDAsync source", source, bytes);
    if (check != CUDA_SUCCESS || bytes == 0) return check;
    return submit(stream, [=] {
        CUresult result = check_at_work("cuMemcpyDtoDAsync target", target, bytes);
        if (result == CUDA_SUCCESS) result = check_at_work("cuMemcpyDtoDAsync source", source, bytes);
        if (result == CUDA_SUCCESS) memmove(host(target), host(source), bytes);
        return result;
    });
}

static CUresult synchronous(CUresult submitted) { return submitted == CUDA_SUCCESS ? drain_legacy() : submitted; }

DRIVER_API cuMemcpyHtoD_v2(CUdeviceptr target, const void* source, size_t bytes) {
    return synchronous(cuMemcpyHtoDAsync_v2(target, source, bytes, nullptr));
}
DRIVER_API cuMemcpyDtoH_v2(void* target, CUdeviceptr source, size_t bytes) {
    return synchronous(cuMemcpyDtoHAsync_v2(target, source, bytes, nullptr));
}
DRIVER_API cuMemcpyDtoD_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
    return synchronous(cuMemcpyDtoDAsync_v2(target, source, bytes, nullptr));
}

template <class T>
static CUresult fill(const char* call, CUdeviceptr target, T value, size_t count, CUstream stream) {
    if (target % sizeof(T) != 0) return CUDA_ERROR_INVALID_VALUE;
    const size_t bytes = count * sizeof(T);
    const CUresult check = check_device(call, target, bytes);
    if (check != CUDA_SUCCESS || bytes == 0) return check;
    return submit(stream, [=] {
        const CUresult result = check_at_work(call, target, bytes);
        for (size_t i = 0; result == CUDA_SUCCESS && i < count; ++i) static_cast<T*>(host(target))[i] = value;
        return result;
    });
}

DRIVER_API cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream) {
    return fill("cuMemsetD8Async", target, value, count, stream);
}
DRIVER_API cuMemsetD16Async(CUdeviceptr target, unsigned short value, size_t count, CUstream stream) {
    return fill("cuMemsetD16Async", target, value, count, stream);
}
DRIVER_API cuMemsetD32Async(CUdeviceptr target, unsigned value, size_t count, CUstream stream) {
    return fill("cuMemsetD32Async", target, value, count, stream);
}
DRIVER_API cuMemsetD8_v2(CUdeviceptr target, unsigned char value, size_t count) {
    return synchronous(cuMemsetD8Async(target, value, count, nullptr));
}
DRIVER_API cuMemsetD32_v2(CUdeviceptr target, unsigned value, size_t count) {
    return synchronous(cuMemsetD32Async(target, value, count, nullptr));
}

// ---- pools: there is one, and it keeps nothing ----

DRIVER_API cuDeviceGetDefaultMemPool(void** pool, CUdevice) {
    *pool = &memory();
    return CUDA_SUCCESS;
}
DRIVER_API cuDeviceGetMemPool(void** pool, CUdevice device) { return cuDeviceGetDefaultMemPool(pool, device); }
DRIVER_API cuMemPoolTrimTo(void*, size_t) { return CUDA_SUCCESS; }
DRIVER_API cuMemPoolSetAttribute(void*, int, void*) { return CUDA_SUCCESS; }
DRIVER_API cuMemPoolGetAttribute(void*, int, void* value) {
    *static_cast<uint64_t*>(value) = 0;
    return CUDA_SUCCESS;
}
DRIVER_API cuMemAllocFromPoolAsync(CUdeviceptr* address, size_t bytes, void*, CUstream stream) {
    return cuMemAllocAsync(address, bytes, stream);
}
