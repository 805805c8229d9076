// One instruction of a warp: PTX's semantics, lane by lane.
#include "numbers.h"
#include <stdlib.h>

// Runs the statement for every lane that takes part, with a, b and c its sources and `result` what
// is written. Without a test where all lanes take part, which compilers vectorise.
#define EACH_LANE(...) \
  do { \
    if (active == UINT32_MAX) for (int lane = 0; lane < LANES; lane++) { __VA_ARGS__; } \
    else for (int lane = 0; lane < LANES; lane++) if (active >> lane & 1) { __VA_ARGS__; } \
  } while (0)
#define RESULT(...) \
  EACH_LANE(uint64_t a = A[lane]; uint64_t b = B[lane]; uint64_t c = C[lane]; (void)a; (void)b; \
            (void)c; D[lane] = (__VA_ARGS__))

static Register nothing; // stands for sources and results that an instruction does not have

// --- values ---

static int compare_numbers(int mode, double a, double b) {
  int unordered = a != a || b != b;
  switch (mode) {
  case EQ: return a == b;
  case NE: return !unordered && a != b;
  case LT: return a < b;
  case LE: return a <= b;
  case GT: return a > b;
  case GE: return a >= b;
  case EQU: return unordered || a == b;
  case NEU: return a != b;
  case LTU: return unordered || a < b;
  case LEU: return unordered || a <= b;
  case GTU: return unordered || a > b;
  case GEU: return unordered || a >= b;
  case NUM: return !unordered;
  default: return unordered;
  }
}

static int compare_integers(int mode, uint64_t a, uint64_t b, int type) {
  int order; // -1, 0 or 1
  if (signed_types[type]) {
    int64_t x = extend(a, type), y = extend(b, type);
    order = (x > y) - (x < y);
  } else {
    a = cut(a, type), b = cut(b, type);
    order = (a > b) - (a < b);
  }
  switch (mode) {
  case EQ: return order == 0;
  case NE: return order != 0;
  case LT: case LO: return order < 0;
  case LE: case LS: return order <= 0;
  case GT: case HI: return order > 0;
  default: return order >= 0;
  }
}

// cvt: to an integer it saturates, and NaN gives 0.
static uint64_t convert(uint64_t x, int to, int from, int flags) {
  if (!float_types[from]) {
    int64_t value = signed_types[from] ? extend(x, from) : (int64_t)cut(x, from);
    if (!float_types[to]) return cut((uint64_t)value, to);
    if (from == TYPE_u64 || from == TYPE_b64)
      return to == TYPE_f32 ? of_float((float)x) : of_number((double)x, to);
    return to == TYPE_f32 ? of_float((float)value) : of_number((double)value, to);
  }
  double value = as_number(x, from);
  if (float_types[to]) {
    if (to == TYPE_f32 && flags & FLUSH) return of_float(flush((float)value));
    return of_number(value, to);
  }
  if (value != value) return 0;
  value = flags & TO_ZERO ? trunc(value) : flags & DOWN ? floor(value)
        : flags & UP ? ceil(value) : nearbyint(value);
  int bits = 8 * bytes_of[to];
  if (signed_types[to]) {
    double limit = ldexp(1, bits - 1);
    if (value >= limit) return cut((1ull << (bits - 1)) - 1, to);
    if (value < -limit) return cut(1ull << (bits - 1), to);
    return cut((uint64_t)(int64_t)value, to);
  }
  if (value < 0) return 0;
  return value >= ldexp(1, bits) ? cut(~0ull, to) : cut((uint64_t)value, to);
}

static uint64_t quotient(float a, float b, int flags) {
  float q = a / b;
  if (flags & APPROXIMATE) {
    // div.approx gives zero where its reciprocal of the divisor would be subnormal
    if (fabsf(b) > 0x1p126f && isfinite(b) && !(flags & FULL_RANGE))
      q = isinf(a) ? NAN : copysignf(0, q);
    q = approximately(q, 2);
  }
  return of_float(flags & FLUSH ? flush(q) : q);
}

// min and max: -0 is less than 0; a NaN counts only with .NaN, or where both are.
static uint64_t extremum(uint64_t x, uint64_t y, int type, int flags, int smallest) {
  if (!float_types[type])
    return cut(compare_integers(smallest ? LT : GT, x, y, type) ? x : y, type);
  double a = as_number(x, type), b = as_number(y, type);
  if (a != a || b != b) return of_number(flags & KEEP_NAN ? NAN : a != a ? b : a, type);
  int first = smallest ? a < b || (a == b && signbit(a)) : a > b || (a == b && signbit(b));
  return first ? x : y;
}

// A float32 function, computed in float32 and rounded; off by some units where it approximates.
static uint64_t special_function(const Instruction *i, uint64_t bits) {
  float x = as_float(bits), y;
  int units = 2;
  if (i->flags & FLUSH) x = flush(x);
  switch (i->operation) {
  case OP_sqrt: y = sqrtf(x), units = 1; break;
  case OP_rsqrt: y = 1 / sqrtf(x); break;
  case OP_rcp: y = 1 / x, units = 1; break;
  case OP_ex2: y = exp2f(x); break;
  default: y = log2f(x), units = 1; break;
  }
  if (i->flags & APPROXIMATE) y = approximately(y, units);
  return of_float(i->flags & FLUSH ? flush(y) : y);
}

// prmt: four bytes chosen from those of b and a, or their signs.
static uint64_t permute(uint64_t a, uint64_t b, uint64_t selector) {
  uint64_t bytes = (a & 0xffffffff) | b << 32, result = 0;
  for (int k = 0; k < 4; k++) {
    int choice = selector >> 4 * k & 15;
    uint8_t byte = (uint8_t)(bytes >> 8 * (choice & 7));
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= (uint64_t)byte << 8 * k;
  }
  return result;
}

static uint64_t extract(uint64_t value, int position, int length, int type) { // bfe
  uint64_t field = position > 63 ? 0 : cut(value, type) >> position;
  field &= length >= 64 ? ~0ull : (1ull << length) - 1;
  if (signed_types[type] && length && length < 64 && field >> (length - 1) & 1)
    field |= ~0ull << length;
  return cut(field, type);
}

static uint64_t shifted_right(uint64_t value, uint32_t by, int type) {
  uint32_t bits = 8 * bytes_of[type];
  if (signed_types[type])
    return cut((uint64_t)(extend(value, type) >> (by < bits ? by : bits - 1)), type);
  return by < bits ? cut(value, type) >> by : 0;
}

static uint64_t high_product(uint64_t a, uint64_t b, int type) {
  int bits = 8 * bytes_of[type];
  if (signed_types[type])
    return cut((uint64_t)(((__int128)extend(a, type) * extend(b, type)) >> bits), type);
  return cut((uint64_t)(((unsigned __int128)cut(a, type) * cut(b, type)) >> bits), type);
}

// mul.wide: to twice as many bits.
static uint64_t wide_product(uint64_t a, uint64_t b, int type) {
  uint64_t product = signed_types[type] ? (uint64_t)(extend(a, type) * extend(b, type))
                                        : cut(a, type) * cut(b, type);
  return bytes_of[type] == 2 ? product & 0xffffffff : product;
}

static uint64_t special_register(const Launch *launch, const Block *block, int warp, int lane,
                                 int number) {
  const unsigned *size = launch->block, axis = number % 3;
  unsigned thread = warp * LANES + lane;
  switch (number / 3) {
  case 0: // tid
    return axis == 0 ? thread % size[0] : axis == 1 ? thread / size[0] % size[1]
                                                    : thread / size[0] / size[1];
  case 1: return block->index[axis]; // ctaid
  case 2: return launch->grid[axis]; // nctaid
  case 3: return size[axis]; // ntid
  default: return axis == 0 ? lane : warp; // laneid, warpid
  }
}

// --- instructions that are more than a value per lane ---

static uint64_t loaded(const unsigned char *from, int type) {
  uint64_t value = 0;
  memcpy(&value, from, bytes_of[type]);
  return signed_types[type] ? (uint64_t)extend(value, type) : value;
}

static int access_global(const Instruction *i, const Block *block, Register *registers,
                         uint32_t active) {
  int bytes = bytes_of[i->type];
  Range known = {1, 0}; // nothing yet
  for (int lane = 0; lane < LANES; lane++) {
    if (!(active >> lane & 1)) continue;
    uint64_t address = registers[i->sources[0]][lane] + i->immediate;
    if (check_access(i, block, address, bytes * i->width, &known)) return FAILS;
    unsigned char *memory = (unsigned char *)(uintptr_t)address;
    if (i->operation == OP_atom_add) {
      uint64_t old = loaded(memory, i->type), added = registers[i->sources[1]][lane];
      uint64_t sum = float_types[i->type]
          ? of_number(as_number(old, i->type) + as_number(added, i->type), i->type) : old + added;
      memcpy(memory, &sum, bytes);
      if (i->n_results) registers[i->results[0]][lane] = old;
      continue;
    }
    for (int k = 0; k < i->width; k++, memory += bytes) {
      if (i->operation == OP_st_global) memcpy(memory, &registers[i->sources[1 + k]][lane], bytes);
      else if (i->results[k] >= 0) registers[i->results[k]][lane] = loaded(memory, i->type);
    }
  }
  return GOES_ON;
}

static int access_shared(const Launch *launch, const Instruction *i, Block *block,
                         Register *registers, uint32_t active) {
  unsigned bytes = bytes_of[i->type];
  for (int lane = 0; lane < LANES; lane++) {
    if (!(active >> lane & 1)) continue;
    uint32_t place = (uint32_t)(registers[i->sources[0]][lane] + i->immediate);
    if (place % (bytes * i->width))
      return fail("line %d: misaligned access to shared memory at %u", i->line, place);
    if ((uint64_t)place + bytes * i->width > launch->shared)
      return fail("line %d: shared memory has %u bytes, and no %u-byte access at %u", i->line,
                  launch->shared, bytes * i->width, place);
    for (int k = 0; k < i->width; k++, place += bytes) {
      if (i->operation == OP_st_shared)
        memcpy(block->shared + place, &registers[i->sources[1 + k]][lane], bytes);
      else if (i->results[k] >= 0)
        registers[i->results[k]][lane] = loaded(block->shared + place, i->type);
    }
  }
  return GOES_ON;
}

// ldmatrix, stmatrix: 8 x 8 matrices of 16-bit elements, two neighbours to a lane. Matrix k has
// the addresses of its rows in the lanes from 8k on.
static int access_matrices(const Launch *launch, const Instruction *i, Block *block,
                           Register *registers, uint32_t active) {
  if (active != UINT32_MAX) return fail("line %d: matrices need all lanes", i->line);
  Register rows;
  memcpy(rows, registers[i->sources[0]], sizeof rows);
  for (int k = 0; k < i->width; k++)
    for (int lane = 0; lane < LANES; lane++)
      for (int half = 0; half < 2; half++) {
        int row = lane / 4, column = lane % 4 * 2 + half;
        if (i->mode) { int other = row; row = column, column = other; } // .trans
        uint32_t place = (uint32_t)(rows[8 * k + row] + i->immediate);
        if (place % 16 || place + 16 > launch->shared)
          return fail("line %d: a matrix's row in shared memory at %u", i->line, place);
        unsigned char *element = block->shared + place + 2 * column;
        if (i->operation == OP_ldmatrix) {
          uint64_t *into = &registers[i->results[k]][lane], value = loaded(element, TYPE_b16);
          *into = half ? (*into & 0xffff) | value << 16 : value;
        } else {
          uint16_t value = (uint16_t)(registers[i->sources[1 + k]][lane] >> 16 * half);
          memcpy(element, &value, 2);
        }
      }
  return GOES_ON;
}

// shfl.sync: a lane reads from another one of its segment, or itself where there is none.
static void shuffle(const Instruction *i, Register *registers, uint32_t active) {
  enum { BFLY, UP_BY, DOWN_BY, INDEX };
  Register source;
  memcpy(source, registers[i->sources[0]], sizeof source);
  EACH_LANE(
    int by = registers[i->sources[1]][lane] & 31;
    int limits = (int)registers[i->sources[2]][lane];
    int segment = limits >> 8 & 31;
    int first = lane & segment;
    int last = first | (limits & 31 & ~segment);
    int other = i->mode == BFLY ? lane ^ by : i->mode == UP_BY ? lane - by
              : i->mode == DOWN_BY ? lane + by : first | (by & ~segment);
    int there = i->mode == UP_BY ? other >= last : other <= last;
    registers[i->results[0]][lane] = source[there ? other & 31 : lane] & 0xffffffff;
    if (i->n_results > 1) registers[i->results[1]][lane] = there
  );
}

// redux.sync: the sum, or the largest, of what all lanes have, in 32 bits.
static void reduce(const Instruction *i, Register *registers, uint32_t active) {
  uint64_t *values = registers[i->sources[0]];
  int64_t sum = 0, largest = INT64_MIN;
  EACH_LANE(
    int64_t value = signed_types[i->type] ? extend(values[lane], i->type)
                                          : (int64_t)(values[lane] & 0xffffffff);
    sum += value;
    if (value > largest) largest = value
  );
  uint64_t result = (uint64_t)(i->operation == OP_redux_add ? sum : largest) & 0xffffffff;
  EACH_LANE(registers[i->results[0]][lane] = result);
}

static void pack(const Instruction *i, Register *registers, uint32_t active) {
  int bits = 8 * bytes_of[i->type] / i->n_sources;
  EACH_LANE(
    uint64_t value = 0;
    for (int k = 0; k < i->n_sources; k++)
      value |= (registers[i->sources[k]][lane] & ~0ull >> (64 - bits)) << bits * k;
    registers[i->results[0]][lane] = value
  );
}

static void unpack(const Instruction *i, Register *registers, uint32_t active) {
  int bits = 8 * bytes_of[i->type] / i->n_results;
  EACH_LANE(
    uint64_t value = registers[i->sources[0]][lane];
    for (int k = 0; k < i->n_results; k++)
      if (i->results[k] >= 0)
        registers[i->results[k]][lane] = value >> bits * k & ~0ull >> (64 - bits)
  );
}

// Everything that computes a result from at most three sources.
static int compute(const Launch *launch, const Instruction *i, const Block *block, int warp,
                   Register *registers, uint32_t active) {
  uint64_t *D = i->n_results ? registers[i->results[0]] : nothing;
  const uint64_t *A = i->n_sources > 0 ? registers[i->sources[0]] : nothing;
  const uint64_t *B = i->n_sources > 1 ? registers[i->sources[1]] : nothing;
  const uint64_t *C = i->n_sources > 2 ? registers[i->sources[2]] : nothing;
  const int type = i->type, flags = i->flags, is_float = float_types[type];
  const uint32_t bits = 8 * bytes_of[type];
  const uint64_t mask = ~0ull >> (64 - bits), sign = 1ull << (bits - 1);
#define ARITHMETIC(operator) \
  if (type == TYPE_f32) RESULT(of_float(as_float(a) operator as_float(b))); \
  else if (is_float) RESULT(of_number(as_number(a, type) operator as_number(b, type), type)); \
  else RESULT((a operator b) & mask); \
  break
  switch (i->operation) {
  case OP_mov: RESULT(a & mask); break;
  case OP_special:
    RESULT(special_register(launch, block, warp, lane, (int)i->immediate));
    break;
  case OP_selp: RESULT((c & 1 ? a : b) & mask); break;
  case OP_prmt: RESULT(permute(a, b, c)); break;
  case OP_bfe: RESULT(extract(a, b & 0xff, c & 0xff, type)); break;
  case OP_add:
    if (type == TYPE_s16x2) {
      RESULT(((a + b) & 0xffff) | (((a >> 16) + (b >> 16)) << 16 & 0xffff0000));
      break;
    }
    ARITHMETIC(+);
  case OP_sub: ARITHMETIC(-);
  case OP_mul: ARITHMETIC(*);
  case OP_mul_lo: RESULT(a * b & mask); break;
  case OP_mad_lo: RESULT((a * b + c) & mask); break;
  case OP_mul_hi: RESULT(high_product(a, b, type)); break;
  case OP_mul_wide: RESULT(wide_product(a, b, type)); break;
  case OP_mad_wide: RESULT(wide_product(a, b, type) + c); break;
  case OP_fma:
    if (type == TYPE_f32) RESULT(of_float(fmaf(as_float(a), as_float(b), as_float(c))));
    else RESULT(of_number(fma(as_number(a, type), as_number(b, type), as_number(c, type)), type));
    break;
  case OP_div:
    if (type == TYPE_f32) RESULT(quotient(as_float(a), as_float(b), flags));
    else if (type == TYPE_f64) RESULT(of_double(as_double(a) / as_double(b)));
    else if (signed_types[type])
      RESULT(b ? (uint64_t)(extend(a, type) / extend(b, type)) & mask : mask);
    else RESULT(cut(b, type) ? cut(a, type) / cut(b, type) : mask);
    break;
  case OP_rem:
    if (signed_types[type]) RESULT(b ? (uint64_t)(extend(a, type) % extend(b, type)) & mask : a);
    else RESULT(cut(b, type) ? cut(a, type) % cut(b, type) : a);
    break;
  case OP_sqrt: case OP_rcp:
    if (type == TYPE_f64) {
      int root = i->operation == OP_sqrt;
      RESULT(of_double(root ? sqrt(as_double(a)) : 1 / as_double(a)));
      break;
    } // fall through
  case OP_rsqrt: case OP_ex2: case OP_lg2: RESULT(special_function(i, a)); break;
  case OP_neg:
    if (is_float) RESULT((a ^ sign) & mask);
    else RESULT(-a & mask);
    break;
  case OP_abs:
    if (is_float) RESULT(a & mask & ~sign);
    else RESULT((a & sign ? -a : a) & mask);
    break;
  case OP_min: RESULT(extremum(a, b, type, flags, 1)); break;
  case OP_max: RESULT(extremum(a, b, type, flags, 0)); break;
  case OP_and: RESULT(a & b); break;
  case OP_or: RESULT(a | b); break;
  case OP_xor: RESULT(a ^ b); break;
  case OP_not: RESULT(type == TYPE_pred ? ~a & 1 : ~a & mask); break;
  case OP_shl: RESULT((uint32_t)b < bits ? a << (uint32_t)b & mask : 0); break;
  case OP_shr: RESULT(shifted_right(a, (uint32_t)b, type)); break;
  case OP_setp:
    if (is_float) RESULT(compare_numbers(i->mode, as_number(a, type), as_number(b, type)));
    else RESULT(compare_integers(i->mode, a, b, type));
    break;
  case OP_cvt:
    if (type == TYPE_bf16x2) RESULT(of_bfloat16(as_float(a)) << 16 | of_bfloat16(as_float(b)));
    else if (type == TYPE_f16x2) RESULT(of_half(as_float(a)) << 16 | of_half(as_float(b)));
    else RESULT(convert(a, type, i->from, flags));
    break;
  case OP_ld_param: RESULT(loaded(launch->parameters + i->immediate, type)); break;
  default: return fail("line %d: an operation without a definition", i->line);
  }
  return GOES_ON;
}

// --- lanes that go different ways ---

// Each lane gets a position of its own.
static void part(Warp *w) {
  if (!w->together) return;
  w->together = 0;
  for (int lane = 0; lane < LANES; lane++) w->positions[lane] = w->position;
}

// The lanes that are at the lowest position: they go first, so that those of a branch meet again
// behind it.
static uint32_t next_lanes(Warp *w) {
  if (w->together) return w->alive;
  uint32_t lowest = UINT32_MAX, lanes = 0;
  for (int lane = 0; lane < LANES; lane++)
    if (w->alive >> lane & 1 && w->positions[lane] < lowest) lowest = w->positions[lane];
  for (int lane = 0; lane < LANES; lane++)
    lanes |= (uint32_t)(w->alive >> lane & 1 && w->positions[lane] == lowest) << lane;
  w->position = lowest;
  w->together = lanes == w->alive;
  return lanes;
}

static void move(Warp *w, uint32_t lanes, uint32_t to) {
  if (w->together) w->position = to;
  else
    for (int lane = 0; lane < LANES; lane++)
      if (lanes >> lane & 1) w->positions[lane] = to;
}

int execute(const Launch *launch, Block *block, int warp) {
  Warp *w = &block->warps[warp];
  uint32_t lanes = next_lanes(w), active = lanes, here = w->position;
  if (here >= (uint32_t)launch->program->size) return fail("a program without a return");
  const Instruction *i = &launch->program->code[here];
  if (i->predicate >= 0) {
    const uint64_t *condition = w->registers[i->predicate];
    uint32_t holds = 0;
    for (int lane = 0; lane < LANES; lane++)
      holds |= (uint32_t)((condition[lane] & 1) ^ i->negated) << lane;
    active &= holds;
  }
  int result = GOES_ON;
  switch (active ? i->operation : OP_fence) {
  case OP_fence: break;
  case OP_bra:
    if (active != lanes) part(w);
    move(w, lanes, here + 1);
    move(w, active, (uint32_t)i->immediate);
    return GOES_ON;
  case OP_ret:
    if (active != w->alive) part(w);
    w->alive &= ~active;
    break;
  case OP_bar:
    if (lanes != w->alive) return fail("line %d: a barrier in a diverged warp", i->line);
    w->waiting = 1;
    break;
  case OP_shfl: case OP_redux_add: case OP_redux_max:
    if (lanes != w->alive) return fail("line %d: a shuffle in a diverged warp", i->line);
    if (i->operation == OP_shfl) shuffle(i, w->registers, active);
    else reduce(i, w->registers, active);
    break;
  case OP_pack: pack(i, w->registers, active); break;
  case OP_unpack: unpack(i, w->registers, active); break;
  case OP_ld_global: case OP_st_global: case OP_atom_add:
    result = access_global(i, block, w->registers, active);
    break;
  case OP_ld_shared: case OP_st_shared:
    result = access_shared(launch, i, block, w->registers, active);
    break;
  case OP_ldmatrix: case OP_stmatrix:
    result = access_matrices(launch, i, block, w->registers, active);
    break;
  default: result = compute(launch, i, block, warp, w->registers, active);
  }
  if (result == FAILS) return FAILS;
  move(w, lanes, here + 1);
  return w->waiting || !w->alive ? STOPS : GOES_ON;
}
