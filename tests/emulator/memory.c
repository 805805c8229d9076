// Global memory is this process's: accesses are checked before they are made.
#include "emulator.h"

// Whoever runs programs says what memory there is: sorted ranges that do not overlap, or a function
// that finds the allocation of an address (and gives -2 where there is none, -1 for memory that
// only the host may use). With neither, nothing is known, and all is allowed.
static Range *ranges;
static int n_ranges = -1;
static int (*find_allocation)(uintptr_t address, uintptr_t *start, size_t *size);

void ptx_memory(Range *sorted, int n) { ranges = sorted, n_ranges = n; }
void ptx_bounds(void *function) { find_allocation = function; }

static int find(uint64_t address, Range *found) {
  if (find_allocation) {
    uintptr_t start;
    size_t size;
    int result = find_allocation(address, &start, &size);
    if (result < 0) return result;
    *found = (Range){start, start + size};
    return 0;
  }
  if (n_ranges < 0) {
    *found = (Range){0, UINT64_MAX};
    return 0;
  }
  int low = 0, high = n_ranges; // the first range that ends beyond the address
  while (low < high) {
    int middle = (low + high) / 2;
    if (ranges[middle].end > address) high = middle;
    else low = middle + 1;
  }
  if (low == n_ranges || ranges[low].start > address) return -2;
  *found = ranges[low];
  return 0;
}

int check_access(const Instruction *instruction, const Block *block, uint64_t address, int bytes,
                 Range *known) {
  const char *what = instruction->operation == OP_ld_global ? "load" : "store";
  int line = instruction->line;
  unsigned long long shown = address;
  if (address % bytes)
    return fail("line %d: misaligned %d-byte %s at %#llx (block %d)", line, bytes, what, shown,
                block->number);
  if (address >= known->start && address + bytes <= known->end) return 0;
  int result = find(address, known);
  if (result == -1)
    return fail("line %d: %s of the host's memory at %#llx (block %d)", line, what, shown,
                block->number);
  if (result < 0 || address + bytes > known->end)
    return fail("line %d: %d-byte %s out of bounds at %#llx (block %d)", line, bytes, what, shown,
                block->number);
  return 0;
}
