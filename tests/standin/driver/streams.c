// Streams, events and graphs: when work is done.
//
// With FAKE_ASYNC=n a stream's work waits in its queue until something waits for it, as
// cudaStreamSynchronize does, or for an event behind it. Now and then a random stream gets some of
// it done by itself, in an order that n decides. What is used before it is there, or after it is
// gone, then holds other numbers. Nothing here is safe against threads that drain the same stream
// at once.
#include "standin.h"
#include <time.h>

__thread int current_device;
__thread cudaError_t last_error = cudaSuccess;

static Stream default_streams[DEVICES], *streams;
static unsigned long long captures;
static uint64_t random_state = 1234567;
EXPORT size_t fake_queued, fake_longest_queue;

double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

int is_async(void) {
  static int mode = -1;
  if (mode < 0) {
    const char *asked = getenv("FAKE_ASYNC");
    mode = asked ? atoi(asked) : 0;
    random_state += mode * 7919ull;
  }
  return mode;
}

static uint64_t random_number(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

Stream *stream_of(void *handle) {
  if ((uintptr_t)handle >= 16) return handle;
  default_streams[current_device].device = current_device;
  return &default_streams[current_device];
}

Stream *new_stream(int priority) {
  Stream *stream = calloc(1, sizeof *stream);
  stream->device = current_device;
  stream->priority = priority;
  return stream;
}

// --- doing it ------------------------------------------------------------------------------------

static void run(Node *node) {
  switch (node->kind) {
  case COPY:
    memmove(node->target, node->source, node->size);
    fake_copies++;
    break;
  case FILL: memset(node->target, node->value, node->size); break;
  case KERNEL: run_kernel(node); break;
  case CALL: node->call(node->target); break;
  case RECORD: ((Mark *)node->target)->pending = 0; break;
  case WAIT: break;  // in the order of the calls there is nothing to wait for
  }
}

static void drain_until(Stream *stream, long at_most, Mark *mark);

static void run_queued(Node *node, Stream *stream) {
  Mark *mark = node->target;
  if (node->kind == WAIT && mark->pending && mark->stream != stream)
    drain_until(mark->stream, -1, mark);
  run(node);
  if (node->staged) free((void *)node->source);
  free(node);
}

// Runs what waits, oldest first: so many pieces (-1: all), and no further than a mark.
static void drain_until(Stream *stream, long at_most, Mark *mark) {
  if (!stream->queue || stream->draining) return;
  int device = current_device;
  current_device = stream->device;
  stream->draining = 1;
  while (stream->queue && at_most-- != 0 && !(mark && !mark->pending)) {
    Node *node = stream->queue;
    if (!(stream->queue = node->next)) stream->tail = &stream->queue;
    fake_queued--;
    run_queued(node, stream);
  }
  stream->draining = 0;
  current_device = device;
}

void drain(Stream *stream) { drain_until(stream, -1, NULL); }

void drain_all(void) {
  for (int again = 1; again;) {
    again = 0;
    for (Stream *stream = streams; stream; stream = stream->next)
      if (stream->queue && !stream->draining) {
        drain(stream);
        again = 1;
      }
  }
}

void progress(void) {
  if (!is_async() || random_number() % 8) return;
  int n = 0;
  for (Stream *stream = streams; stream; stream = stream->next) n++;
  if (!n) return;
  Stream *chosen = streams;
  for (int k = random_number() % n; k; k--) chosen = chosen->next;
  drain_until(chosen, 1 + random_number() % 4, NULL);
}

static void enlist(Stream *stream) {
  if (stream->tail) return;
  stream->tail = &stream->queue;
  stream->next = streams;
  streams = stream;
}

static void enqueue(Stream *stream, const Node *work) {
  enlist(stream);
  Node *node = malloc(sizeof *node);
  *node = *work;
  node->next = NULL;
  *stream->tail = node;
  stream->tail = &node->next;
  if (++fake_queued > fake_longest_queue) fake_longest_queue = fake_queued;
}

void submit(Stream *stream, Node work) {
  if (stream->capturing) {
    Graph *graph = stream->capturing;
    Node *node = malloc(sizeof *node);
    *node = work;
    node->next = NULL;
    *graph->last = node;
    graph->last = &node->next;
    graph->size++;
    return;
  }
  if (!is_async()) {
    run(&work);
    return;
  }
  int pageable_target = work.kind == COPY && fake_block((uintptr_t)work.target, 0, 0) == UNKNOWN;
  if (pageable_target) {  // such a copy waits, and is done when the call returns
    drain(stream);
    run(&work);
    return;
  }
  if (work.kind == COPY && fake_block((uintptr_t)work.source, 0, 0) == UNKNOWN) {
    void *copy = malloc(work.size + 1);  // pageable memory is read before the call returns
    work.source = memcpy(copy, work.source, work.size);
    work.staged = 1;
  }
  enqueue(stream, &work);
  progress();
}

// For the operators that torch's CPU kernels compute: a call in the place of a kernel. It is put
// into the graph or the queue (1), or left to the caller (0).
EXPORT int fake_host_node(void *handle, void (*call)(void *), void *argument) {
  Stream *stream = stream_of(handle);
  if (!stream->capturing && !is_async()) return 0;
  submit(stream, (Node){.kind = CALL, .call = call, .target = argument});
  return 1;
}

// --- events --------------------------------------------------------------------------------------

void record(Event *event, Stream *stream) {
  event->captured = stream->capturing;
  if (stream->capturing) return;
  event->time = seconds();
  if (!is_async()) return;
  event->mark = malloc(sizeof(Mark));  // queues may hold it for longer than the event lives
  *event->mark = (Mark){.pending = 1, .stream = stream};
  submit(stream, (Node){.kind = RECORD, .target = event->mark});
}

void wait_for(Event *event, Stream *stream) {
  if (event->captured && event->captured->open) {  // what waits for a capture takes part in it
    enlist(stream);
    stream->capturing = event->captured;
    return;
  }
  if (event->mark && event->mark->pending && !stream->capturing)
    submit(stream, (Node){.kind = WAIT, .target = event->mark});
}

void synchronize_event(Event *event) {
  if (event->mark && event->mark->pending) drain_until(event->mark->stream, -1, event->mark);
}

// --- graphs --------------------------------------------------------------------------------------

void begin_capture(Stream *stream) {
  stream->capturing = calloc(1, sizeof(Graph));
  stream->capturing->last = &stream->capturing->first;
  stream->capturing->open = ++captures;
}

Graph *end_capture(Stream *stream) {
  Graph *graph = stream->capturing;
  graph->open = 0;
  stream->capturing = NULL;
  for (Stream *other = streams; other; other = other->next)
    if (other->capturing == graph) other->capturing = NULL;
  return graph;
}

void replay(Graph *graph, Stream *stream) {
  for (Node *node = graph->first; node; node = node->next) submit(stream, *node);
}
