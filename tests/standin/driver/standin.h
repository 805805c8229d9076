// A stand-in for a GPU's driver: what its parts share.
//
// Together they are as much of libcuda.so.1 and libcudart.so as torch's CUDA build and Triton's
// launcher call. Device memory is host memory. Work is done at once, in the order of the calls; it
// is put into a graph under capture, and waits in stream queues with FAKE_ASYNC. Compiled kernels
// go to a hook that executes them. torch's own kernels cannot be executed, only named and counted.
#pragma once
#define _GNU_SOURCE
#define __CUDA_RUNTIME_API_H_NO_WRAPPERS
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define DEVICES 2
#define DEVICE_NAME "NVIDIA H200 (stand-in)"
#define MAX_PARAMETERS 64  // of a kernel, and their bytes:
#define PARAMETER_BYTES 256

// The present device of this thread, and the last error of the runtime.
extern __thread int current_device;
extern __thread cudaError_t last_error;
extern pthread_mutex_t memory_lock;

// --- memory.c ------------------------------------------------------------------------------------

enum { PINNED = -1, UNKNOWN = -2 };  // instead of a device
void *allocate(size_t size, int device);
int release(void *address);
// The device of an address, or PINNED or UNKNOWN; and the allocation that it lies in.
int fake_block(uintptr_t address, uintptr_t *base, size_t *size);

// --- streams.c -----------------------------------------------------------------------------------

typedef struct {
  char name[200];
  int n_parameters, sizes[MAX_PARAMETERS];
  void *program;  // for the hook
} Function;

typedef enum { COPY, FILL, KERNEL, CALL, RECORD, WAIT } Kind;

typedef struct Node {  // a piece of work
  Kind kind;
  void *target;  // COPY, FILL: where to; CALL: the argument; RECORD, WAIT: the mark
  const void *source;
  size_t size;
  int value, staged;  // staged: the source is a copy that the node owns
  Function *function;
  unsigned grid[3], block[3], shared;
  unsigned char parameters[PARAMETER_BYTES];
  void (*call)(void *);
  struct Node *next;
} Node;

typedef struct {
  Node *first, **last;
  size_t size;
  unsigned long long open;  // the number of the capture, while it goes on
} Graph;

typedef struct Stream {
  int device, priority;
  Graph *capturing;     // or NULL
  Node *queue, **tail;  // what waits
  int draining;
  struct Stream *next;  // in the list of all that ever had a queue
} Stream;

typedef struct {  // one record of an event; a new record does not change what waits for an old one
  int pending;
  Stream *stream;
} Mark;

typedef struct {
  double time;
  Mark *mark;       // of the last record
  Graph *captured;  // in which it was recorded last, if in one
} Event;

double seconds(void);
int is_async(void);
Stream *new_stream(int priority);
Stream *stream_of(void *handle);  // NULL and the special handles are the present device's default
void begin_capture(Stream *stream);
Graph *end_capture(Stream *stream);
void submit(Stream *stream, Node work);  // capture, enqueue or run it
void replay(Graph *graph, Stream *stream);
void record(Event *event, Stream *stream);
void wait_for(Event *event, Stream *stream);
void synchronize_event(Event *event);
void drain(Stream *stream);
void drain_all(void);
void progress(void);  // now and then some of what waits gets done

// --- kernels.c -----------------------------------------------------------------------------------

extern size_t fake_launches, fake_synchronizations, fake_copies, fake_modules;
void run_kernel(const Node *node);
CUresult launch(Function *function, const unsigned *grid, const unsigned *block, unsigned shared,
                void *stream, void **parameters);
