// libcudart, as far as torch calls it.
#include "standin.h"

static cudaError_t failed(cudaError_t error) { return last_error = error; }

// Under capture a stream must not be waited for; torch checks little of that itself.
static cudaError_t refused(const char *what) {
  fprintf(stderr, "stand-in: %s under capture\n", what);
  return failed(cudaErrorStreamCaptureUnsupported);
}

EXPORT cudaError_t cudaDriverGetVersion(int *version) {
  *version = 13000;
  return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = 13000;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORT cudaError_t cudaPeekAtLastError(void) { return last_error; }
EXPORT const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
  case cudaSuccess: return "no error";
  case cudaErrorMemoryAllocation: return "out of memory";
  case cudaErrorNotReady: return "device not ready";
  case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
  default: return "an error of the stand-in for the runtime";
  }
}
EXPORT const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorOfTheStandIn"; }
EXPORT cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

// --- devices -------------------------------------------------------------------------------------

EXPORT cudaError_t cudaGetDeviceCount(int *count) {
  *count = DEVICES;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int *device) {
  *device = current_device;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= DEVICES) return failed(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, device);  // the same numbers
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, DEVICE_NAME);
  cudaDeviceGetAttribute(&properties->major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&properties->minor, cudaDevAttrComputeCapabilityMinor, device);
  properties->totalGlobalMem = 141ull << 30;
  properties->l2CacheSize = 60 << 20;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  properties->sharedMemPerMultiprocessor = 233472;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = INT32_MAX;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->multiProcessorCount = 132;
  properties->memoryBusWidth = 6144;
  properties->unifiedAddressing = 1;
  properties->asyncEngineCount = 3;
  properties->pciBusID = 1 + device;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  snprintf(id, size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize(void) {
  fake_synchronizations++;
  drain_all();
  return cudaSuccess;
}

// --- memory --------------------------------------------------------------------------------------

EXPORT cudaError_t cudaMalloc(void **address, size_t size) {
  *address = allocate(size, current_device);
  return *address ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
EXPORT cudaError_t cudaFree(void *address) {
  drain_all();
  if (address && !release(address)) {
    fprintf(stderr, "stand-in: %p is freed, and was not allocated\n", address);
    return failed(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
  *address = allocate(size, PINNED);
  return *address ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
EXPORT cudaError_t cudaFreeHost(void *address) {
  drain_all();
  release(address);
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostRegister(void *address, size_t size, unsigned flags) {
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostUnregister(void *address) { return cudaSuccess; }
EXPORT cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *available = 140ull << 30;
  *total = 141ull << 30;
  return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes,
                                            const void *address) {
  int device = fake_block((uintptr_t)address, NULL, NULL);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = device == UNKNOWN  ? cudaMemoryTypeUnregistered
                     : device == PINNED ? cudaMemoryTypeHost
                                        : cudaMemoryTypeDevice;
  attributes->device = device < 0 ? 0 : device;
  attributes->devicePointer = device == UNKNOWN ? NULL : (void *)address;
  attributes->hostPointer = device == PINNED ? (void *)address : NULL;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
  return cudaErrorNotSupported;
}
EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
  return cudaErrorNotSupported;
}

// --- copies --------------------------------------------------------------------------------------

static int is_pageable(const void *address) {
  return fake_block((uintptr_t)address, NULL, NULL) == UNKNOWN;
}

EXPORT cudaError_t cudaMemcpy(void *target, const void *source, size_t size,
                              enum cudaMemcpyKind kind) {
  fake_synchronizations++;
  drain_all();
  memmove(target, source, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size,
                                   enum cudaMemcpyKind kind, cudaStream_t handle) {
  Stream *stream = stream_of(handle);
  if (stream->capturing && kind != cudaMemcpyDeviceToDevice &&
      (is_pageable(target) || is_pageable(source)))
    return refused("a copy of pageable memory");
  submit(stream, (Node){.kind = COPY, .target = target, .source = source, .size = size});
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void *target, int target_device, const void *source,
                                       int source_device, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(target, source, size, cudaMemcpyDeviceToDevice, stream);
}
EXPORT cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source,
                                     size_t source_pitch, size_t width, size_t height,
                                     enum cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++) {
    cudaError_t error =
        cudaMemcpyAsync((char *)target + row * target_pitch,
                        (const char *)source + row * source_pitch, width, kind, stream);
    if (error) return error;
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void *target, int value, size_t size, cudaStream_t stream) {
  submit(stream_of(stream), (Node){.kind = FILL, .target = target, .value = value, .size = size});
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void *target, int value, size_t size) {
  return cudaMemsetAsync(target, value, size, NULL);
}

// --- streams -------------------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags,
                                                int priority) {
  *stream = (cudaStream_t)new_stream(priority);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
  progress();
  return stream_of(stream)->queue ? failed(cudaErrorNotReady) : cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Stream *stream = stream_of(handle);
  fake_synchronizations++;
  if (stream->capturing) return refused("a wait for the stream");
  drain(stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call,
                                         void *argument, unsigned flags) {
  drain(stream_of(stream));
  call(stream, cudaSuccess, argument);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *argument) {
  submit(stream_of(stream), (Node){.kind = CALL, .call = call, .target = argument});
  return cudaSuccess;
}

// --- events --------------------------------------------------------------------------------------

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = calloc(1, sizeof(Event));
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) {
  return cudaEventCreateWithFlags(event, 0);
}
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream,
                                            unsigned flags) {
  record((Event *)event, stream_of(stream));
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  wait_for((Event *)event, stream_of(stream));
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
  progress();
  Mark *mark = ((Event *)event)->mark;
  return mark && mark->pending ? failed(cudaErrorNotReady) : cudaSuccess;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  fake_synchronizations++;
  synchronize_event((Event *)event);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = 1e3 * (((Event *)end)->time - ((Event *)start)->time);
  return cudaSuccess;
}

// --- captures and graphs -------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream,
                                         enum cudaStreamCaptureStatus *status) {
  *status =
      stream_of(stream)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  begin_capture(stream_of(stream));
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = (cudaGraph_t)end_capture(stream_of(stream));
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle,
                                            enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **dependencies,
                                            const cudaGraphEdgeData **edges, size_t *count) {
  Graph *capturing = stream_of(handle)->capturing;
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = capturing ? capturing->open : 0;
  if (graph) *graph = (cudaGraph_t)capturing;
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  static __thread enum cudaStreamCaptureMode present = cudaStreamCaptureModeGlobal;
  enum cudaStreamCaptureMode before = present;
  present = *mode;
  *mode = before;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph,
                                                 unsigned long long flags) {
  *executable = (cudaGraphExec_t)graph;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  replay((Graph *)executable, stream_of(stream));
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  *count = ((Graph *)graph)->size;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return cudaSuccess; }
EXPORT cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *held, cudaHostFn_t destroy,
                                        unsigned count, unsigned flags) {
  *object = NULL;
  return cudaSuccess;
}
EXPORT cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) {
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object,
                                             unsigned count, unsigned flags) {
  return cudaSuccess;
}

// --- what torch asks of its own kernels ----------------------------------------------------------

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes,
                                         const void *kernel) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attribute,
                                        int value) {
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *kernel, int threads, size_t shared, unsigned flags) {
  *blocks = 8;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel,
                                                                 int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads, shared, 0);
}
