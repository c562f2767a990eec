/* A libcuda.so.1 without a GPU: what Triton's launcher calls. Tensor maps and launches are checked against the rules of
   the CUDA driver API; launches are handed to `on_launch`, see driver.py. */

#include "cuda.h"
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define MAGIC 0x70616d54    /* marks a tensor map that was made here */

typedef struct {
  uint32_t magic, type;
  uint64_t address, size[5], stride[4];
  uint32_t box[5], rank, swizzle;
} Map; /* within the 128 bytes of a CUtensorMap */

typedef int (*Launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, void **);

static Launch on_launch;
static unsigned shared_bytes; /* the most a block may have */
static char refusal[256] = "no error";
static uintptr_t functions;

void set_device(Launch callback, unsigned shared) { on_launch = callback, shared_bytes = shared; }

static CUresult refuse(const char *rule, long found) {
  snprintf(refusal, sizeof refusal, "%s, not %ld", rule, found);
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) { *text = refusal; return CUDA_SUCCESS; }
/* so late that Triton does not correct what earlier drivers write into the maps of small tensors */
CUresult cuDriverGetVersion(int *version) { *version = 13900; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = CU_STREAM_CAPTURE_STATUS_NONE; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)++functions;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

/* An H200's 132 multiprocessors are in groups that hold 32 clusters of four. */
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 132 / config->attrs[0].value.clusterDim.x - (config->attrs[0].value.clusterDim.x > 2);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_bytes; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_bytes + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *made, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box,
                                const cuuint32_t *step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const int element_bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}; /* in the order of CUtensorMapDataType */
  static const int spans[] = {0, 32, 64, 128};
  Map map = {MAGIC, type, (uint64_t)address};
  long element = element_bytes[type];
  if ((uintptr_t)made % 64) return refuse("a tensor map must be 64-byte aligned", (uintptr_t)made % 64);
  if (rank < 1 || rank > 5) return refuse("a tensor map has 1 to 5 dimensions", rank);
  if ((uintptr_t)address % 16) return refuse("globalAddress must be 16-byte aligned", (uintptr_t)address % 16);
  for (cuuint32_t i = 0; i < rank; i++) {
    if (size[i] < 1 || size[i] > 1ull << 32) return refuse("globalDim must be from 1 to 2^32", size[i]);
    if (box[i] < 1 || box[i] > 256) return refuse("boxDim must be from 1 to 256", box[i]);
    if (step[i] != 1) return refuse("elementStrides are expected to be 1", step[i]);
    map.size[i] = size[i], map.box[i] = box[i];
    if (i + 1 == rank) break;
    if (stride[i] % 16 || stride[i] >= 1ull << 40) return refuse("globalStrides must be multiples of 16", stride[i]);
    if (stride[i] < (i ? stride[i - 1] : element)) return refuse("globalStrides must not fall", stride[i]);
    map.stride[i] = stride[i];
  }
  if (box[0] * element % 16) return refuse("the inner box must be a multiple of 16 bytes", box[0] * element);
  if (spans[swizzle] && box[0] * element > spans[swizzle])
    return refuse("the inner box must fit into the swizzle", box[0] * element);
  map.rank = rank, map.swizzle = spans[swizzle];
  memcpy(made, &map, sizeof map);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) cluster = config->attrs[i].value.clusterDim.x;
  if (config->gridDimX % cluster) return refuse("the grid must be a multiple of the cluster", config->gridDimX);
  if (config->gridDimX > 0x7fffffff) return refuse("gridDimX must be below 2^31", config->gridDimX);
  if (config->gridDimY > 65535) return refuse("gridDimY must be below 65536", config->gridDimY);
  if (config->gridDimZ > 65535) return refuse("gridDimZ must be below 65536", config->gridDimZ);
  if (config->blockDimX > 1024) return refuse("a block has at most 1024 threads", config->blockDimX);
  if (config->sharedMemBytes > shared_bytes) return refuse("a block has less shared memory", config->sharedMemBytes);
  return on_launch(function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, cluster, parameters)
             ? CUDA_ERROR_LAUNCH_FAILED
             : CUDA_SUCCESS;
}
