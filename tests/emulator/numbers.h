// Registers hold bits: what they mean, and how numbers are rounded to them.
#ifndef NUMBERS_H
#define NUMBERS_H
#include "emulator.h"
#include <float.h>
#include <math.h>
#include <string.h>

#define BYTES(name, bytes, is_signed, is_float) bytes,
static const int bytes_of[] = {TYPES(BYTES)};
#define SIGNED(name, bytes, is_signed, is_float) is_signed,
static const int signed_types[] = {TYPES(SIGNED)};
#define FLOAT(name, bytes, is_signed, is_float) is_float,
static const int float_types[] = {TYPES(FLOAT)};

static inline float as_float(uint64_t bits) {
  uint32_t low = (uint32_t)bits;
  float x;
  memcpy(&x, &low, 4);
  return x;
}

static inline uint64_t of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static inline double as_double(uint64_t bits) {
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

static inline uint64_t of_double(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}

static inline float as_bfloat16(uint64_t bits) { return as_float((bits & 0xffff) << 16); }

// To nearest, ties to even; NaN becomes the one that GPUs write.
static inline uint64_t of_bfloat16(float x) {
  if (x != x) return 0x7fff;
  uint32_t bits = (uint32_t)of_float(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff;
}

static inline float as_half(uint64_t bits) {
  uint32_t magnitude = bits & 0x7fff;
  float x;
  if (magnitude < 0x400) x = magnitude * 0x1p-24f; // subnormal
  else if (magnitude < 0x7c00) x = as_float((magnitude << 13) + ((127 - 15) << 23));
  else x = as_float(magnitude << 13 | 0x7f800000); // infinity, NaN
  return bits & 0x8000 ? -x : x;
}

static inline uint64_t of_half(float x) {
  uint32_t bits = (uint32_t)of_float(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (x != x) return 0x7fff;
  if (fabsf(x) >= 65520.0f) return sign | 0x7c00; // rounds beyond the largest number
  if (fabsf(x) < 0x1p-14f) return sign | (uint32_t)nearbyintf(fabsf(x) * 0x1p24f); // subnormal
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return sign | (magnitude - ((127 - 15) << 23)) >> 13;
}

// float32, rounded such that a second rounding to 16 bits gives what one rounding would: inexact
// results are rounded to odd.
static inline float to_odd(double x) {
  float nearest = (float)x;
  if (nearest == x || x != x || isinf(nearest)) return nearest;
  uint32_t bits = (uint32_t)of_float(nearest);
  if (fabs((double)nearest) > fabs(x)) bits -= 1;
  return as_float(bits | 1);
}

static inline double as_number(uint64_t bits, int type) {
  switch (type) {
  case TYPE_f32: return as_float(bits);
  case TYPE_f64: return as_double(bits);
  case TYPE_bf16: return as_bfloat16(bits);
  default: return as_half(bits);
  }
}

static inline uint64_t of_number(double x, int type) {
  switch (type) {
  case TYPE_f32: return of_float((float)x);
  case TYPE_f64: return of_double(x);
  case TYPE_bf16: return of_bfloat16(to_odd(x));
  default: return of_half(to_odd(x));
  }
}

// The bits that belong to a type, and an integer with its sign.
static inline uint64_t cut(uint64_t bits, int type) {
  return bits & ~0ull >> (64 - 8 * bytes_of[type]);
}

static inline int64_t extend(uint64_t bits, int type) {
  int above = 64 - 8 * bytes_of[type];
  return (int64_t)(bits << above) >> above;
}

static inline float flush(float x) { return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x; }

// With noise, any number within the error that PTX documents for an approximation.
static inline float approximately(float x, int units) {
  if (!approximation_noise || !isfinite(x) || x == 0) return x;
  return as_float(of_float(x) + random_number() % (2 * units + 1) - units);
}
#endif
