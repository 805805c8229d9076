// Allocations: host memory that knows its device, poisoned, with guard pages behind it.
#include "standin.h"
#include <sys/mman.h>

typedef struct {
  uintptr_t base;
  size_t size, mapped;
  int device;
} Block;

static Block *blocks;  // by address
static size_t n_blocks, capacity;
pthread_mutex_t memory_lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

// Bytes on devices now and at most, and the number of allocations so far.
EXPORT size_t fake_allocated, fake_peak, fake_allocations;

static size_t last_before(uintptr_t address) {  // the last block that starts there or before, or -1
  size_t low = 0, high = n_blocks;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (blocks[middle].base <= address)
      low = middle + 1;
    else
      high = middle;
  }
  return low - 1;
}

EXPORT int fake_block(uintptr_t address, uintptr_t *base, size_t *size) {
  pthread_mutex_lock(&memory_lock);
  int device = UNKNOWN;
  size_t i = last_before(address);
  if (i != (size_t)-1) {
    Block *block = &blocks[i];
    if (address < block->base + (block->size ? block->size : 1)) {
      device = block->device;
      if (base) *base = block->base;
      if (size) *size = block->size;
    }
  }
  pthread_mutex_unlock(&memory_lock);
  return device;
}

void *allocate(size_t size, int device) {
  const size_t page = 4096, guard = 2 * page, poisoned = 1 << 20;
  size_t mapped = (size + page - 1 + guard) / page * page;
  char *memory = mmap(NULL, mapped, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return NULL;
  // No zeros, as on a GPU. The rest of a large block is left alone: it may be larger than the host.
  if (device >= 0) memset(memory, 0xCB, size < poisoned ? size : poisoned);
  pthread_mutex_lock(&memory_lock);
  if (n_blocks == capacity) {
    capacity = capacity ? 2 * capacity : 1024;
    blocks = realloc(blocks, capacity * sizeof *blocks);
  }
  size_t i = last_before((uintptr_t)memory) + 1;
  memmove(blocks + i + 1, blocks + i, (n_blocks - i) * sizeof *blocks);
  blocks[i] = (Block){(uintptr_t)memory, size, mapped, device};
  n_blocks++;
  if (device >= 0) {
    fake_allocations++;
    fake_allocated += size;
    if (fake_allocated > fake_peak) fake_peak = fake_allocated;
  }
  pthread_mutex_unlock(&memory_lock);
  return memory;
}

int release(void *address) {
  pthread_mutex_lock(&memory_lock);
  size_t i = last_before((uintptr_t)address);
  int found = i != (size_t)-1 && blocks[i].base == (uintptr_t)address;
  if (found) {
    if (blocks[i].device >= 0) fake_allocated -= blocks[i].size;
    munmap(address, blocks[i].mapped);
    memmove(blocks + i, blocks + i + 1, (n_blocks - i - 1) * sizeof *blocks);
    n_blocks--;
  }
  pthread_mutex_unlock(&memory_lock);
  return found;
}
