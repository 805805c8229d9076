// What the parts of the emulator share: instructions, programs, warps and blocks. See README.md.
#ifndef EMULATOR_H
#define EMULATOR_H
#include <stddef.h>
#include <stdint.h>

#define LANES 32 // threads of a warp
#define MOST_VALUES 8 // that one instruction loads or stores

// Operations go by PTX's names, with an underscore for a dot. ptx.py reads the list through
// ptx_operation(), so that an operation is named here and where it is executed, and nowhere else.
#define OPERATIONS(X) \
  X(mov) X(pack) X(unpack) X(special) X(selp) X(prmt) X(cvt) X(setp) \
  X(add) X(sub) X(mul) X(mul_lo) X(mul_hi) X(mul_wide) X(mad_lo) X(mad_wide) X(fma) X(div) X(rem) \
  X(min) X(max) X(neg) X(abs) X(sqrt) X(rsqrt) X(rcp) X(ex2) X(lg2) \
  X(and) X(or) X(xor) X(not) X(shl) X(shr) X(bfe) \
  X(ld_param) X(ld_global) X(st_global) X(ld_shared) X(st_shared) X(ldmatrix) X(stmatrix) \
  X(atom_add) X(shfl) X(redux_add) X(redux_max) X(bar) X(fence) X(bra) X(ret)
#define OPERATION(name) OP_##name,
enum { OPERATIONS(OPERATION) N_OPERATIONS };

// Types: name, bytes, whether it is a signed integer, whether it is a number with a point.
#define TYPES(X) \
  X(b8, 1, 0, 0) X(b16, 2, 0, 0) X(b32, 4, 0, 0) X(b64, 8, 0, 0) \
  X(u8, 1, 0, 0) X(u16, 2, 0, 0) X(u32, 4, 0, 0) X(u64, 8, 0, 0) \
  X(s8, 1, 1, 0) X(s16, 2, 1, 0) X(s32, 4, 1, 0) X(s64, 8, 1, 0) \
  X(f16, 2, 0, 1) X(bf16, 2, 0, 1) X(f32, 4, 0, 1) X(f64, 8, 0, 1) \
  X(pred, 1, 0, 0) X(bf16x2, 4, 0, 0) X(f16x2, 4, 0, 0) X(s16x2, 4, 0, 0)
#define TYPE(name, bytes, is_signed, is_float) TYPE_##name,
enum { TYPES(TYPE) N_TYPES };

// Comparisons of setp, in the order that ptx.py numbers them.
enum { EQ, NE, LT, LE, GT, GE, LO, LS, HI, HS, EQU, NEU, LTU, LEU, GTU, GEU, NUM, IS_NAN };

// Modifiers of an instruction, as bits.
enum {
  FLUSH = 1, // .ftz: subnormal float32 numbers count as zero
  APPROXIMATE = 2, // .approx, .full
  TO_ZERO = 4, DOWN = 8, UP = 16, // .rzi, .rmi, .rpi; else to the nearest integer
  KEEP_NAN = 32, // .NaN: min and max give NaN where one argument is
  FULL_RANGE = 64, // .full: a quotient by more than 2^126 is not zero
};

typedef struct {
  int32_t operation, type, from; // from: the second type of cvt
  int32_t predicate, negated; // register that says which lanes take part, or -1
  int32_t n_results, n_sources;
  int32_t results[MOST_VALUES], sources[MOST_VALUES + 1]; // registers; -1 for a result not wanted
  int32_t width; // values of a load or store
  int32_t flags, mode; // mode: setp's comparison, shfl's kind, ldmatrix's transposition
  int32_t line; // in the PTX
  int64_t immediate; // offset of an address, target of a branch, number of a special register
} Instruction;

typedef struct {
  Instruction *code;
  int size, n_registers, n_constants;
  int32_t *constant_registers; // registers that hold constants, and these
  uint64_t *constants;
} Program;

// A register holds 64 bits per lane, whatever its type; what is narrower has zeros above it, or a
// sign where a load extends it.
typedef uint64_t Register[LANES];

typedef struct {
  Register *registers;
  uint32_t alive, waiting; // lanes that have not returned; whether the warp is at a barrier
  int together; // whether all lanes are at `position`; else each is at its own
  uint32_t position, positions[LANES];
  int executed; // instructions so far
  uint64_t rank; // of two warps, the one of lower rank may go first
} Warp;

typedef struct {
  int number, n_warps;
  unsigned index[3];
  Warp *warps;
  unsigned char *shared;
} Block;

typedef struct {
  const Program *program;
  unsigned grid[3], block[3], shared; // shared: bytes of shared memory
  const unsigned char *parameters;
} Launch;

enum { GOES_ON = 0, STOPS = 1, FAILS = -1 };

// execute.c: the next instruction of a warp. STOPS: it waits at a barrier, or all lanes returned.
int execute(const Launch *launch, Block *block, int warp);

// memory.c: whether an access to global memory is aligned and in bounds; FAILS with an error. The
// bounds of the allocation are left in `known`, for the next lane.
typedef struct { uint64_t start, end; } Range;
int check_access(const Instruction *instruction, const Block *block, uint64_t address, int bytes,
                 Range *known);

// run.c
int fail(const char *format, ...); // notes the first error of a launch; FAILS
uint64_t random_number(void);
extern int approximation_noise;
#endif
