// Kernels: those that Triton compiled are executed by a hook, torch's own are counted and named.
#include "standin.h"

// Counters: compiled kernels that ran (at replays, too), launches of torch's, and the name of the
// last of these.
EXPORT size_t fake_launches, fake_torch_launches;
EXPORT char fake_torch_kernel[512];
// Waits for the device, copies, modules that were loaded.
EXPORT size_t fake_synchronizations, fake_copies, fake_modules;

typedef int (*Hook)(void *program, const unsigned *grid, const unsigned *block, unsigned shared,
                    const unsigned char *parameters);
static Hook hook;
EXPORT void fake_set_hook(Hook chosen) { hook = chosen; }

// The sizes of a compiled kernel's parameters, and its program for the hook.
EXPORT void fake_register(Function *function, int n, const int *sizes, void *program) {
  function->n_parameters = n;
  memcpy(function->sizes, sizes, n * sizeof *sizes);
  function->program = program;
}

static int asked(const char *variable) { return getenv(variable) != NULL; }

static int traces(void) {
  static int traces = -1;
  return traces < 0 ? traces = asked("FAKE_TRACE") : traces;
}

void run_kernel(const Node *node) {
  Function *function = node->function;
  fake_launches++;
  if (traces())
    fprintf(stderr, "stand-in: %s, %u programs\n", function->name, node->grid[0] * node->grid[1]);
  if (hook && function->program)
    hook(function->program, node->grid, node->block, node->shared, node->parameters);
}

CUresult launch(Function *function, const unsigned *grid, const unsigned *block, unsigned shared,
                void *handle, void **parameters) {
  Stream *stream = stream_of(handle);
  if (!grid[0] || !grid[1] || !grid[2] || grid[0] > INT32_MAX || grid[1] > 65535 || grid[2] > 65535)
    return CUDA_ERROR_INVALID_VALUE;
  if (stream->device != current_device) return CUDA_ERROR_INVALID_HANDLE;
  Node node = {.kind = KERNEL, .function = function, .shared = shared};
  memcpy(node.grid, grid, sizeof node.grid);
  memcpy(node.block, block, sizeof node.block);
  int at = 0;
  for (int i = 0; i < function->n_parameters; i++) {
    int size = function->sizes[i];
    at = (at + size - 1) / size * size;
    if (at + size > PARAMETER_BYTES) return CUDA_ERROR_INVALID_VALUE;
    memcpy(node.parameters + at, parameters[i], size);
    at += size;
  }
  submit(stream, node);
  return CUDA_SUCCESS;
}

// --- torch's own ---------------------------------------------------------------------------------

typedef struct {
  const void *stub;
  const char *name;
} Known;
static Known *known;
static size_t n_known, capacity;

EXPORT void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[1];
  return handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **handle) {}
EXPORT void __cudaUnregisterFatBinary(void **handle) {}
EXPORT void __cudaRegisterVar(void **handle, char *host, char *device, const char *name,
                              int external, size_t size, int constant, int global) {}
EXPORT void __cudaRegisterFunction(void **handle, const char *stub, char *device, const char *name,
                                   int limit, void *a, void *b, void *c, void *d, int *e) {
  if (n_known == capacity) {
    capacity = capacity ? 2 * capacity : 65536;
    known = realloc(known, capacity * sizeof *known);
  }
  known[n_known++] = (Known){stub, name};
}
EXPORT char __cudaInitModule(void **handle) { return 0; }
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *stub) {
  *kernel = (cudaKernel_t)stub;
  return cudaSuccess;
}

static __thread struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} configuration;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                            struct CUstream_st *stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared,
                                              void *stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(void **)stream = configuration.stream;
  return cudaSuccess;
}

static cudaError_t not_run(const void *stub) {
  static int quick = -1;  // FAKE_QUICK: without names, for measurements of time on the host
  if (quick < 0) quick = asked("FAKE_QUICK");
  fake_torch_launches++;
  if (quick) return cudaSuccess;
  const char *name = "unknown";
  for (size_t i = 0; i < n_known; i++)
    if (known[i].stub == stub) {
      name = known[i].name;
      break;
    }
  snprintf(fake_torch_kernel, sizeof fake_torch_kernel, "%s", name);
  if (traces()) fprintf(stderr, "stand-in: torch's kernel, not run: %.180s\n", name);
  return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchKernel(const void *stub, dim3 grid, dim3 block, void **arguments,
                                    size_t shared, cudaStream_t stream) {
  return not_run(stub);
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t stub, dim3 grid, dim3 block, void **arguments,
                                      size_t shared, cudaStream_t stream) {
  return not_run(stub);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *stub,
                                       void **arguments) {
  return not_run(stub);
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *stub, dim3 grid, dim3 block,
                                               void **arguments, size_t shared,
                                               cudaStream_t stream) {
  return not_run(stub);
}
