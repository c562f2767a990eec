/* Vectors of LANES floats: AVX-512, AVX2, and vector extensions of GCC and Clang for everything else (NEON: 4 lanes).
 *
 * Only what the extensions cannot say is written with intrinsics. -DGENERIC -DLANES=16 compiles the code of 16 lanes
 * for a machine that has no AVX-512, for tests.
 */
#pragma once
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
int omp_get_max_threads(void); /* no omp.h: a compiler may come without it */
#endif

#if defined(__AVX512F__) && !defined(GENERIC)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__) && !defined(GENERIC)
#include <immintrin.h>
#define LANES 8
#elif !defined(LANES)
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef float loose __attribute__((vector_size(4 * LANES), may_alias, aligned(4))); /* at any address of a float */
typedef int32_t ivec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t loose_ivec __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));
typedef uint8_t bytes __attribute__((vector_size(LANES), may_alias, aligned(1)));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define ALL ((1u << LANES) - 1)
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#if LANES == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#elif LANES == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#define EVEN 0, 2, 4, 6
#endif

INLINE vec splat(float f) { return (vec){0} + f; }
INLINE vec load(const float *at) { return (vec) * (const loose *)at; }
INLINE void store(float *at, vec v) { *(loose *)at = v; }

/* lanes: a set of lanes, made of bits. QUAD(at) repeats four floats, and SPREAD(quad, at, i) is a vector of at[i]: one
 * load for all four, because loads are the bottleneck. pick(x, index) is x[index], pick_quad(QUAD(at), index) is
 * at[index], index < 4, and gather_some(at, index) is at[index] of any index. store_bool(at, v) writes a byte of 0 or 1 for
 * each lane of 0 or -1; bits_of(v) is a bit for each of them. */
#if defined(__AVX512F__) && !defined(GENERIC)
typedef __mmask16 lanes;
INLINE lanes some(uint32_t bits) { return (lanes)bits; }
INLINE vec load_some(const float *at, lanes m) { return (vec)_mm512_maskz_loadu_ps(m, at); }
INLINE void store_some(float *at, lanes m, vec v) { _mm512_mask_storeu_ps(at, m, (__m512)v); }
INLINE vec gather_some(const float *at, ivec index, lanes m) {
  return (vec)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, (__m512i)index, at, 4);
}
INLINE vec pick(vec x, ivec index) { return (vec)_mm512_permutexvar_ps((__m512i)index, (__m512)x); }
INLINE vec pick_quad(vec quad, ivec index) { return (vec)_mm512_permutevar_ps((__m512)quad, (__m512i)index); }
INLINE ivec widen(const uint8_t *at) { return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)); }
INLINE void store_bool(uint8_t *at, ivec v) {
  _mm_storeu_si128((__m128i *)at, _mm_maskz_set1_epi8(_mm512_movepi32_mask((__m512i)v), 1));
}
INLINE uint32_t bits_of(ivec v) { return _mm512_movepi32_mask((__m512i)v); }
INLINE vec max(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); } /* b where either is NaN */
INLINE vec min(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#define QUAD(at) (vec) _mm512_broadcast_f32x4(_mm_loadu_ps(at))
#define SPREAD(quad, at, i) (vec) _mm512_permute_ps((__m512)quad, 0x55 * i)
#elif defined(__AVX2__) && !defined(GENERIC)
typedef __m256i lanes;
INLINE lanes some(uint32_t bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), bit), bit);
}
INLINE vec load_some(const float *at, lanes m) { return (vec)_mm256_maskload_ps(at, m); }
INLINE void store_some(float *at, lanes m, vec v) { _mm256_maskstore_ps(at, m, (__m256)v); }
INLINE vec gather_some(const float *at, ivec index, lanes m) {
  return (vec)_mm256_mask_i32gather_ps(_mm256_setzero_ps(), at, (__m256i)index, (__m256)m, 4);
}
INLINE vec pick(vec x, ivec index) { return (vec)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index); }
INLINE vec pick_quad(vec quad, ivec index) { return (vec)_mm256_permutevar_ps((__m256)quad, (__m256i)index); }
INLINE ivec widen(const uint8_t *at) { return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at)); }
INLINE uint32_t bits_of(ivec v) { return _mm256_movemask_ps((__m256)v); }
INLINE void store_bool(uint8_t *at, ivec v) {
  uint64_t bits = bits_of(v);
  bits = bits * 0x0101010101010101 & 0x8040201008040201; /* bit i in byte i */
  bits = (bits + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101;
  memcpy(at, &bits, 8);
}
INLINE vec max(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vec min(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
#define QUAD(at) (vec) _mm256_broadcast_ps((const __m128 *)(at))
#define SPREAD(quad, at, i) (vec) _mm256_permute_ps((__m256)quad, 0x55 * i)
#else
typedef uint32_t lanes;
INLINE lanes some(uint32_t bits) { return bits; }
INLINE vec load_some(const float *at, lanes m) {
  vec v = {0};
  for (int i = 0; i < LANES; i++)
    if (m >> i & 1) v[i] = at[i];
  return v;
}
INLINE void store_some(float *at, lanes m, vec v) {
  for (int i = 0; i < LANES; i++)
    if (m >> i & 1) at[i] = v[i];
}
INLINE vec gather_some(const float *at, ivec index, lanes m) {
  vec v = {0};
  for (int i = 0; i < LANES; i++)
    if (m >> i & 1) v[i] = at[index[i]];
  return v;
}
INLINE vec pick(vec x, ivec index) {
  vec v;
  for (int i = 0; i < LANES; i++) v[i] = x[index[i]];
  return v;
}
INLINE vec pick_quad(vec quad, ivec index) { return pick(quad, index); }
INLINE ivec widen(const uint8_t *at) {
  ivec v;
  for (int i = 0; i < LANES; i++) v[i] = at[i];
  return v;
}
INLINE uint32_t bits_of(ivec v) {
  uint32_t bits = 0;
  for (int i = 0; i < LANES; i++) bits |= (v[i] & 1u) << i;
  return bits;
}
INLINE void store_bool(uint8_t *at, ivec v) { *(bytes *)at = __builtin_convertvector(v, bytes) & 1; }
INLINE vec max(vec a, vec b) {
  ivec m = a > b;
  return (vec)((m & (ivec)a) | (~m & (ivec)b));
}
INLINE vec min(vec a, vec b) {
  ivec m = a < b;
  return (vec)((m & (ivec)a) | (~m & (ivec)b));
}
INLINE vec QUAD(const float *at) {
  vec v;
  for (int i = 0; i < LANES; i++) v[i] = at[i % 4];
  return v;
}
#define SPREAD(quad, at, i) splat((at)[i])
#endif

/* Moves the highest bit of an element's index, in the order of `count` vectors, to the lowest place: a perfect shuffle.
 * log2(LANES) times over LANES vectors it is their transposition. */
INLINE void interleave(vec *v, int count) {
  vec w[32];
  UNROLL for (int i = 0; i < count / 2; i++) {
    w[2 * i] = SHUFFLE(v[i], v[i + count / 2], LOW);
    w[2 * i + 1] = SHUFFLE(v[i], v[i + count / 2], HIGH);
  }
  UNROLL for (int i = 0; i < count; i++) v[i] = w[i];
}

INLINE void transpose(vec *v) {
  UNROLL for (int d = 1; d < LANES; d *= 2) interleave(v, LANES);
}

/* 2^t for -126 <= t <= 128 (there it is infinite); a polynomial of the lowest largest error, 2.3e-7 */
INLINE vec exp2_of(vec t) {
  ivec e = __builtin_convertvector(t + 126.5f, ivec) - 126; /* the nearest integer */
  vec f = t - __builtin_convertvector(e, vec);
  vec p = splat(1.3395310379564762e-3f);
  p = p * f + 9.67078935354948e-3f;
  p = p * f + 5.550343543291092e-2f;
  p = p * f + 2.4022211134433746e-1f;
  p = p * f + 6.931471824645996e-1f;
  return (p * f + 1.f) * (vec)((e + 127) << 23);
}

/* Memory of this thread for one use, kept until it needs more or ends; NULL where there is none. Aligned to pages. */
enum { TILES, WEIGHTS };
struct memory {
  float *at[2];
  long size[2];
};
static pthread_key_t memory_key;
static int has_key; /* else the memory of a thread that ends is lost */
static inline void release(void *of) {
  struct memory *m = of;
  free(m->at[TILES]), free(m->at[WEIGHTS]);
  *m = (struct memory){{0}};
}
static inline void make_key(void) { has_key = !pthread_key_create(&memory_key, release); }
INLINE float *scratch(int use, long floats) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  static _Thread_local struct memory m;
  if (m.size[use] < floats) {
    pthread_once(&once, make_key);
    if (has_key) pthread_setspecific(memory_key, &m);
    free(m.at[use]);
    m.at[use] = aligned_alloc(4096, (floats * sizeof(float) + 4095) / 4096 * 4096);
    m.size[use] = m.at[use] ? floats : 0;
  }
  return m.at[use];
}

INLINE long least(long a, long b) { return a < b ? a : b; }

/* How many tiles of at most `most` vectors: a multiple of the threads where there are enough vectors. */
INLINE long count_tiles(long vectors, long most) {
  long tiles = (vectors + most - 1) / most, threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
#endif
  return least(vectors, (tiles + threads - 1) / threads * threads);
}
