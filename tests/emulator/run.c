// Runs a program: blocks and warps in a random order, a few blocks at a time.
//
// In every turn one warp of the resident blocks runs for a random number of instructions. Half of
// the launches draw it anew each time. In the others every warp has a random rank, and the first
// that can run does, so that some warps are far ahead of others. So what depends on an order of
// warps or blocks shows, over a few seeds. Memory is sequentially consistent: a missing fence does
// not show, a missing barrier does.
#include "emulator.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_RESIDENT 64
#define MOST_WARPS 32
#define MOST_SHARED 232448 // bytes that a block can have
#define LONGEST_TURN 200
#define LONGEST_REIGN 32 // turns, on average, until a warp gets another rank
#define LONGEST_LIFE 20000000 // instructions of a warp, beyond which it counts as hanging
#define UNINITIALISED 0xCB // every byte of memory and registers that nothing was written to

static uint64_t random_state = 88172645463325252ull;
static int resident = 3;
int approximation_noise = 0;
static char first_error[1024];
static int n_errors;

#define NAME(name) #name,
static const char *const operation_names[] = {OPERATIONS(NAME)};
#define TYPE_NAME(name, bytes, is_signed, is_float) #name,
static const char *const type_names[] = {TYPES(TYPE_NAME)};
const char *ptx_operation(int i) { return i < N_OPERATIONS ? operation_names[i] : NULL; }
const char *ptx_type(int i) { return i < N_TYPES ? type_names[i] : NULL; }

// Orders follow from the seed. `blocks` are resident at a time. With `noise`, approximations are
// off by anything that PTX allows.
void ptx_config(uint64_t seed, int blocks, int noise) {
  random_state = seed * 2654435761ull + 88172645463325252ull;
  resident = blocks < 1 ? 1 : blocks > MOST_RESIDENT ? MOST_RESIDENT : blocks;
  approximation_noise = noise;
}

uint64_t random_number(void) { // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

int fail(const char *format, ...) {
  if (n_errors++ == 0) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(first_error, sizeof first_error, format, arguments);
    va_end(arguments);
  }
  return FAILS;
}

// The number of errors since the last call, and the first of them.
int ptx_errors(char *text, int size) {
  int n = n_errors;
  snprintf(text, size, "%s", first_error);
  n_errors = 0;
  first_error[0] = 0;
  return n;
}

// Programs are kept for good: there are as many as kernels that are tested.
Program *ptx_create(const Instruction *code, int size, int n_registers, int n_constants,
                    const int32_t *constant_registers, const uint64_t *constants) {
  Program *p = calloc(1, sizeof *p);
  p->size = size, p->n_registers = n_registers, p->n_constants = n_constants;
  p->code = malloc(size * sizeof *code);
  p->constant_registers = malloc(n_constants * sizeof(int32_t) + 1);
  p->constants = malloc(n_constants * sizeof(uint64_t) + 1);
  memcpy(p->code, code, size * sizeof *code);
  memcpy(p->constant_registers, constant_registers, n_constants * sizeof(int32_t));
  memcpy(p->constants, constants, n_constants * sizeof(uint64_t));
  return p;
}

static void *uninitialised(size_t bytes) {
  void *memory = malloc(bytes);
  return memset(memory, UNINITIALISED, bytes);
}

static Block *create_block(const Launch *launch, int number, int n_warps) {
  const Program *p = launch->program;
  const unsigned *grid = launch->grid;
  Block *b = calloc(1, sizeof *b);
  b->number = number, b->n_warps = n_warps;
  b->index[0] = number % grid[0];
  b->index[1] = number / grid[0] % grid[1];
  b->index[2] = number / grid[0] / grid[1];
  b->shared = uninitialised(launch->shared + 1);
  b->warps = calloc(n_warps, sizeof(Warp));
  for (int k = 0; k < n_warps; k++) {
    Warp *w = &b->warps[k];
    w->registers = uninitialised(p->n_registers * sizeof(Register));
    w->alive = UINT32_MAX;
    w->together = 1;
    w->rank = random_number();
    for (int i = 0; i < p->n_constants; i++)
      for (int lane = 0; lane < LANES; lane++)
        w->registers[p->constant_registers[i]][lane] = p->constants[i];
  }
  return b;
}

static void free_block(Block *b) {
  for (int k = 0; k < b->n_warps; k++) free(b->warps[k].registers);
  free(b->warps);
  free(b->shared);
  free(b);
}

static int is_ready(const Warp *w) { return w->alive && !w->waiting; }

// Where no warp of a block can run: lets all pass the barrier, or says that the block is done
// (STOPS). A barrier that some warp returned without is an error, as the others would hang.
static int pass_barrier(Block *b) {
  int waiting = 0;
  for (int k = 0; k < b->n_warps; k++) {
    if (is_ready(&b->warps[k])) return GOES_ON;
    waiting += b->warps[k].waiting;
  }
  if (waiting == 0) return STOPS;
  if (waiting < b->n_warps)
    return fail("a barrier is not reached by all warps (block %d)", b->number);
  for (int k = 0; k < b->n_warps; k++) b->warps[k].waiting = 0;
  return GOES_ON;
}

// A turn of one warp that can run: the one of lowest rank, or any.
static int take_turn(const Launch *launch, Block **blocks, int n_blocks, int by_rank) {
  Block *chosen = NULL;
  int warp = 0, n_ready = 0;
  for (int i = 0; i < n_blocks; i++)
    for (int k = 0; k < blocks[i]->n_warps; k++) {
      if (!is_ready(&blocks[i]->warps[k])) continue;
      n_ready++;
      if (chosen && (by_rank ? blocks[i]->warps[k].rank > chosen->warps[warp].rank
                             : random_number() % n_ready)) continue;
      chosen = blocks[i], warp = k;
    }
  Warp *w = &chosen->warps[warp];
  int result = GOES_ON;
  for (int n = 1 + random_number() % LONGEST_TURN; n > 0 && result == GOES_ON; n--) {
    result = execute(launch, chosen, warp);
    if (++w->executed > LONGEST_LIFE) return fail("a warp does not end (block %d)", chosen->number);
  }
  if (random_number() % LONGEST_REIGN == 0) w->rank = random_number();
  return result == FAILS ? FAILS : GOES_ON;
}

static int *shuffled(int n) {
  int *order = malloc(n * sizeof(int));
  for (int k = 0; k < n; k++) {
    int j = random_number() % (k + 1);
    order[k] = order[j];
    order[j] = k;
  }
  return order;
}

// Runs a launch to its end. Parameters lie as PTX declares them. 0, or FAILS and ptx_errors().
int ptx_run(const Program *program, const unsigned *grid, const unsigned *block, unsigned shared,
            const unsigned char *parameters) {
  Launch launch = {program, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared,
                   parameters};
  int n_blocks = grid[0] * grid[1] * grid[2], threads = block[0] * block[1] * block[2];
  if (threads % LANES || threads > MOST_WARPS * LANES || shared > MOST_SHARED)
    return fail("a block of %d threads with %u bytes of shared memory", threads, shared);
  Block *blocks[MOST_RESIDENT];
  int by_rank = random_number() % 2;
  int *order = shuffled(n_blocks), started = 0, present = 0, result = GOES_ON;
  while (result != FAILS && (started < n_blocks || present)) {
    while (present < resident && started < n_blocks)
      blocks[present++] = create_block(&launch, order[started++], threads / LANES);
    for (int k = present - 1; k >= 0 && result != FAILS; k--) {
      result = pass_barrier(blocks[k]);
      if (result != STOPS) continue;
      free_block(blocks[k]);
      blocks[k] = blocks[--present];
    }
    if (result != FAILS && present) result = take_turn(&launch, blocks, present, by_rank);
  }
  for (int k = 0; k < present; k++) free_block(blocks[k]);
  free(order);
  return result == FAILS ? FAILS : 0;
}
