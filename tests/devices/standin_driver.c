/* Stands in for libcuda.so.1: the calls of cuda_driver.py, over memory of the host, against CUDA's own header.
 *
 * The compiler sees to it that these functions are what the header declares, so a call through ctypes that gives them
 * something else arrives as something else. They refuse what the header's comments say is refused. What they were last
 * given is in `standin`. */
#include <cuda.h>
#include <cudaTypedefs.h>
#include <stdint.h>
#include <string.h>

#define MOST_RANGES 256

struct standin {
    uint64_t contexts_set, batches, registrations, version_asked, flags_asked, register_flags, device_asked;
    uint64_t attribute_asked, count, num_attrs, order, stream, refuse_at;
    int64_t driver_version;
} standin = {.driver_version = 13000, .refuse_at = UINT64_MAX};

static struct { uintptr_t at; size_t nbytes; } ranges[MOST_RANGES];
static _Thread_local CUcontext current = NULL;

/* Where a registered range holds the address: the range's end; 0 where none does. */
static uintptr_t end_of(uintptr_t at) {
    for (int i = 0; i < MOST_RANGES; i++)
        if (ranges[i].nbytes && at >= ranges[i].at && at - ranges[i].at < ranges[i].nbytes)
            return ranges[i].at + ranges[i].nbytes;
    return 0;
}

/* A copy that begins in a registered range must end in it, and one that begins elsewhere must not run into one. */
static int lies_in_one(uintptr_t at, size_t nbytes) {
    uintptr_t end = end_of(at);
    if (end) return at + nbytes <= end;
    for (int i = 0; i < MOST_RANGES; i++)
        if (ranges[i].nbytes && ranges[i].at >= at && ranges[i].at - at < nbytes) return 0;
    return 1;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    *context = current;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    current = context;
    standin.contexts_set++;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    standin.device_asked = (uint64_t)ordinal;
    if (ordinal < 0 || ordinal > 7) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    standin.attribute_asked = (uint64_t)attribute;
    if (device < 0 || device > 7) return CUDA_ERROR_INVALID_DEVICE;
    *value = attribute == CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_INVALID_VALUE                  ? "CUDA_ERROR_INVALID_VALUE"
            : error == CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED ? "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"
                                                             : NULL;
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemHostRegister(void *memory, size_t nbytes, unsigned int flags) { /* the header calls it _v2 */
    uintptr_t at = (uintptr_t)memory;
    standin.register_flags = flags;
    if (!nbytes || !current) return current ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_CONTEXT;
    if (end_of(at) || !lies_in_one(at, nbytes)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    for (int i = 0; i < MOST_RANGES; i++)
        if (!ranges[i].nbytes) {
            ranges[i].at = at;
            ranges[i].nbytes = nbytes;
            standin.registrations++;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemHostUnregister(void *memory) {
    for (int i = 0; i < MOST_RANGES; i++)
        if (ranges[i].nbytes && ranges[i].at == (uintptr_t)memory) {
            ranges[i].nbytes = 0;
            standin.registrations--;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}

static CUresult batch_12080(
    CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *attrs, size_t *first,
    size_t num_attrs, size_t *failed, CUstream stream
) {
    standin.count = count;
    standin.num_attrs = num_attrs;
    standin.stream = (uint64_t)(uintptr_t)stream;
    *failed = SIZE_MAX;
    if (!stream || stream == CU_STREAM_LEGACY || !count || !num_attrs || num_attrs > count || first[0] != 0)
        return CUDA_ERROR_INVALID_VALUE;
    standin.order = attrs[0].srcAccessOrder;
    if (attrs[0].srcAccessOrder < CU_MEMCPY_SRC_ACCESS_ORDER_STREAM ||
        attrs[0].flags > CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE ||
        attrs[0].srcAccessOrder > CU_MEMCPY_SRC_ACCESS_ORDER_ANY || attrs[0].srcLocHint.type ||
        attrs[0].srcLocHint.id || attrs[0].dstLocHint.type || attrs[0].dstLocHint.id)
        return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < count; i++)
        if (!sizes[i] || i == standin.refuse_at || !lies_in_one((uintptr_t)dsts[i], sizes[i]) ||
            !lies_in_one((uintptr_t)srcs[i], sizes[i])) {
            *failed = i;
            return CUDA_ERROR_INVALID_VALUE;
        }
    for (size_t i = 0; i < count; i++)
        memcpy((void *)(uintptr_t)dsts[i], (const void *)(uintptr_t)srcs[i], sizes[i]);
    standin.batches++;
    return CUDA_SUCCESS;
}

/* What a driver of CUDA 13 answers to those who ask for 13000: no failed, so the stream stands in its place. */
static CUresult batch_13000(
    CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *attrs, size_t *first,
    size_t num_attrs, CUstream stream
) {
    size_t failed;
    return batch_12080(dsts, srcs, sizes, count, attrs, first, num_attrs, &failed, stream);
}

/* "The corresponding versioned function": of the version that was asked for or the newest before it, never one newer. */
CUresult cuGetProcAddress(
    const char *symbol, void **address, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status
) {
    PFN_cuMemcpyBatchAsync_v12080 batch = batch_12080; /* the header's own type */
    standin.version_asked = (uint64_t)version;
    standin.flags_asked = flags;
    *address = NULL;
    if (version > standin.driver_version) return CUDA_ERROR_INVALID_VALUE;
    *status = CU_GET_PROC_ADDRESS_SUCCESS;
    if (strcmp(symbol, "cuMemcpyBatchAsync"))
        *status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    else if (version < 12080)
        *status = CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
    else
        *address = version < 13000 ? (void *)batch : (void *)batch_13000;
    return CUDA_SUCCESS; /* with no address where there is nothing */
}
