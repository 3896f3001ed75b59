/* A libcuda.so.1 that does nothing and writes down what it was asked, so that the host side can be tested without a GPU and without kernels.
 *
 * MOCK_CUDA_DRIVER (12080), MOCK_CUDA_SM (80), MOCK_CUDA_DEVICES (1): what it claims to be. MOCK_CUDA_INIT, MOCK_CUDA_LOAD: what cuInit and
 * cuModuleLoadData return. There is no memory: a call that allocated or copied would not find its function. A kernel's name says what its arguments are: k24 has a struct of 24 bytes, k8m2 one of 8 bytes and two tensor maps. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void *handle;

static int number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

#define SAY(...) (printf("mock: " __VA_ARGS__), fflush(stdout))

static _Thread_local handle current;

int cuInit(unsigned flags) { return flags ? 1 : number("MOCK_CUDA_INIT", 0); }
int cuDriverGetVersion(int *version) { return *version = number("MOCK_CUDA_DRIVER", 12080), 0; }
int cuDeviceGetCount(int *count) { return *count = number("MOCK_CUDA_DEVICES", 1), 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char *name, int len, int device) { return snprintf(name, len, "mock %d", device), 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int sm = number("MOCK_CUDA_SM", 80);
    switch (attribute) {
    case 75: *value = sm / 10; break;
    case 76: *value = sm % 10; break;
    case 16: *value = 108; break;
    case 97: *value = 163 * 1024; break;
    case 38: *value = 40 << 20; break;
    default: *value = 0;
    }
    return device < 0;
}
int cuDevicePrimaryCtxRetain(handle *context, int device) { return *context = (handle)(intptr_t)(0x1000 + device), 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device < 0; }
int cuCtxGetCurrent(handle *context) { return *context = current, 0; }
int cuCtxSetCurrent(handle context) { return current = context, 0; }
int cuCtxGetDevice(int *device) { return *device = (int)(intptr_t)current - 0x1000, 0; }
int cuCtxGetId(handle context, uint64_t *id) { return *id = (uint64_t)(intptr_t)context * 7, 0; }
int cuCtxSynchronize(void) { return SAY("cuCtxSynchronize\n"), 0; }
int cuStreamCreate(handle *stream, unsigned flags) { return *stream = (handle)(intptr_t)(0x5000 + flags), 0; }
int cuStreamDestroy_v2(handle stream) { return stream == 0; }
int cuGetErrorName(int code, const char **name) { return *name = code == 222 ? "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" : "MOCK_ERROR", 0; }
int cuGetErrorString(int code, const char **text) { return *text = code ? "as the test wished" : "no error", 0; }

int cuModuleLoadData(handle *module, const char *text) {
    const char *target = strstr(text, ".target");
    SAY("cuModuleLoadData %.*s\n", target ? (int)strcspn(target, "\n") : 0, target ? target : "");
    return *module = (handle)0x2000, number("MOCK_CUDA_LOAD", 0);
}
int cuModuleGetFunction(handle *function, handle module, const char *name) {
    SAY("cuModuleGetFunction %s\n", name);
    *function = strdup(name);
    return strstr(name, "missing") ? 500 : module == 0;
}
int cuFuncSetAttribute(handle function, int attribute, int value) {
    SAY("cuFuncSetAttribute %s %d %d\n", (char *)function, attribute, value);
    return 0;
}

static int launched(handle function, handle stream, void **arguments) {
    const char *name = function;
    int bytes = atoi(name + 1), maps = strchr(name, 'm') ? atoi(strchr(name, 'm') + 1) : 0;
    printf(" stream %zx arguments ", (size_t)stream);
    for (int i = 0; i < bytes; i++) printf("%02x", ((uint8_t *)arguments[0])[i]);
    for (int m = 1; m <= maps; m++)
        printf(" map %llx aligned %d", *(unsigned long long *)arguments[m], (int)((uintptr_t)arguments[m] % 64 == 0));
    printf("\n");
    fflush(stdout);
    return strstr(name, "refused") ? 701 : 0;
}
int cuLaunchKernel(handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, handle stream,
                   void **arguments, void **extra) {
    printf("mock: cuLaunchKernel %s grid %u %u %u block %u %u %u shared %u", (char *)function, gx, gy, gz, bx, by, bz, shared);
    return extra ? 1 : launched(function, stream, arguments);
}
struct attribute {
    int id, pad;
    unsigned value[16];
};
struct config {
    unsigned grid[3], block[3], shared;
    handle stream;
    struct attribute *attributes;
    unsigned count;
};
int cuLaunchKernelEx(const struct config *c, handle function, void **arguments, void **extra) {
    printf("mock: cuLaunchKernelEx %s grid %u %u %u block %u %u %u shared %u", (char *)function, c->grid[0], c->grid[1], c->grid[2], c->block[0],
           c->block[1], c->block[2], c->shared);
    for (unsigned i = 0; i < c->count; i++) {
        const struct attribute *a = &c->attributes[i];
        printf(" attribute %d: %u %u %u", a->id, a->value[0], a->value[1], a->value[2]);
    }
    return extra ? 1 : launched(function, c->stream, arguments);
}
int cuTensorMapEncodeTiled(uint64_t *map, int dtype, uint32_t rank, void *address, const uint64_t *dims, const uint64_t *strides, const uint32_t *box,
                           const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
    printf("mock: cuTensorMapEncodeTiled dtype %d at %zx", dtype, (size_t)address);
    for (uint32_t i = 0; i < rank; i++) printf(" dim %llu box %u step %u", (unsigned long long)dims[i], box[i], steps[i]);
    for (uint32_t i = 0; i + 1 < rank; i++) printf(" stride %llu", (unsigned long long)strides[i]);
    printf(" swizzle %d\n", swizzle);
    fflush(stdout);
    memset(map, 0, 128);
    map[0] = (uint64_t)(uintptr_t)address + 1;
    return (interleave | fill) != 0 || promotion < 0;
}
