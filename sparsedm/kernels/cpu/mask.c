/* The mask of an N:M pattern in one pass, and the decay of SR-STE: bit for bit what `pattern.py` and torch compute.
 *
 * Groups lie along the lanes, LANES of them. Every weight of a group meets every later one, the magnitudes as integers:
 * the larger comes before the other, the lower index before its equal. Kept are those whom fewer than `keep` precede.
 */
#include "vectors.h"

INLINE void compete(const vec *w, int group, int keep, ivec *kept, ivec *nan) {
  ivec magnitude[32], before[32];
  for (int i = 0; i < group; i++) {
    magnitude[i] = (ivec)w[i] & 0x7fffffff;
    before[i] = (ivec){0} + i;
    *nan |= magnitude[i] > 0x7f800000;
  }
  UNROLL for (int i = 0; i < group; i++) {
    UNROLL for (int j = i + 1; j < group; j++) {
      ivec later = magnitude[j] > magnitude[i]; /* -1 where j comes before i */
      before[i] -= later;
      before[j] += later;
    }
  }
  for (int i = 0; i < group; i++) kept[i] = before[i] < keep;
}

INLINE int any(ivec v) {
  int32_t found = 0;
  for (int i = 0; i < LANES; i++) found |= v[i];
  return found != 0;
}

/* LANES groups whose weights follow each other */
INLINE void select_block(const float *w, int group, int keep, float *masked, uint8_t *mask, ivec *nan) {
  vec v[32];
  ivec kept[32];
  UNROLL for (int i = 0; i < group; i++) v[i] = load(w + i * LANES);
  UNROLL for (int d = 1; d < LANES; d *= 2) interleave(v, group);
  compete(v, group, keep, kept, nan);
  UNROLL for (int d = 1; d < group; d *= 2) interleave((vec *)kept, group);
  UNROLL for (int i = 0; i < group; i++) {
    store(masked + i * LANES, (vec)((ivec)load(w + i * LANES) & kept[i]));
    store_bool(mask + i * LANES, kept[i]);
  }
}

/* One group per lane, its weights `inner` apart: a convolution's, whose taps are the lanes */
INLINE void select_taps(const float *w, int group, long inner, int keep, int have, float *masked, uint8_t *mask, ivec *nan) {
  vec v[32];
  ivec kept[32];
  lanes m = some(have == LANES ? ALL : (1u << have) - 1);
  for (int i = 0; i < group; i++) v[i] = load_some(w + i * inner, m);
  compete(v, group, keep, kept, nan);
  for (int i = 0; i < group; i++) {
    store_some(masked + i * inner, m, (vec)((ivec)v[i] & kept[i]));
    for (int t = 0; t < have; t++) mask[i * inner + t] = kept[i][t] & 1;
  }
}

/* The blocks from .. to - 1: of LANES groups that follow each other, or where inner > 1 of the groups of all taps. */
INLINE int select_blocks(const float *w, long from, long to, int group, long inner, int keep, float *masked, uint8_t *mask) {
  ivec nan = {0};
  for (long b = from; b < to; b++) {
    if (inner == 1) {
      long at = b * LANES * group;
      select_block(w + at, group, keep, masked + at, mask + at, &nan);
    } else
      for (long t = 0; t < inner; t += LANES) {
        long at = b * group * inner + t;
        select_taps(w + at, group, inner, keep, least(inner - t, LANES), masked + at, mask + at, &nan);
      }
  }
  return any(nan);
}

/* not inline: a parallel loop around code for a fixed group would make the group a variable */
#define SELECT(G)                                                                                                      \
  static int select_##G(const float *w, long from, long to, long inner, int keep, float *masked, uint8_t *mask) { \
    return select_blocks(w, from, to, G, inner, keep, masked, mask);                                                   \
  }
SELECT(2) SELECT(4) SELECT(8) SELECT(16) SELECT(32)

/* w (outer, group, inner) -> masked = w * mask, and mask of bytes 0 or 1. Returns whether a weight is NaN. */
int nm_select(const float *w, long outer, int group, long inner, int keep, float *masked, uint8_t *mask) {
  int (*const select)(const float *, long, long, long, int, float *, uint8_t *) =
      group == 2 ? select_2 : group == 4 ? select_4 : group == 8 ? select_8 : group == 16 ? select_16 : select_32;
  long blocks = inner == 1 ? outer / LANES : outer, parts = outer * group * inner > 1 << 15 ? 32 : 1;
  int found = 0;
#pragma omp parallel for schedule(static) reduction(| : found) if (parts > 1)
  for (long i = 0; i < parts; i++)
    found |= select(w, blocks * i / parts, blocks * (i + 1) / parts, inner, keep, masked, mask);
  if (inner == 1 && outer % LANES) {
    float rest[32 * LANES] = {0}, masked_rest[32 * LANES];
    uint8_t mask_rest[32 * LANES];
    long at = blocks * LANES * group, n = outer % LANES * group;
    memcpy(rest, w + at, n * sizeof(float));
    found |= select(rest, 0, 1, 1, keep, masked_rest, mask_rest);
    memcpy(masked + at, masked_rest, n * sizeof(float));
    memcpy(mask + at, mask_rest, n);
  }
  return found;
}

/* out = g + decay * w where the mask is 0, else g: the product and the sum are rounded one after the other, as torch does */
void nm_decay(const float *g, const float *w, const uint8_t *mask, float decay, long n, float *out) {
#pragma omp parallel for schedule(static) if (n > 1 << 15)
  for (long i = 0; i < n; i++) {
    float pull = decay * w[i];
    int32_t bits;
    memcpy(&bits, &pull, 4);
    bits &= mask[i] - 1; /* between product and sum, so that no compiler fuses them */
    memcpy(&pull, &bits, 4);
    out[i] = g[i] + pull;
  }
}

/* ---- a number that tells whether any bit has changed ------------------------------------------------------------------- */

typedef uint32_t uvec __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t loose_uvec __attribute__((vector_size(4 * LANES), may_alias, aligned(1)));

/* Like Fletcher's sums: b adds up the partial sums a, so that the order counts. a is rotated, or two signs that change
 * would cancel each other: twice the highest bit is 0. */
static uint64_t checksum_part(const char *at, long n) {
  enum { STEP = 4 * sizeof(uvec) };
  uvec a[4] = {{0}}, b[4] = {{0}}, rest[4] = {{0}};
  const char *end = at + n;
  for (; at + STEP <= end; at += STEP)
    UNROLL for (int i = 0; i < 4; i++)
      a[i] = (a[i] << 5 | a[i] >> 27) + *(const loose_uvec *)(at + i * sizeof(uvec)), b[i] += a[i];
  memcpy(rest, at, end - at);
  uint64_t all = n;
  for (int i = 0; i < 4; i++) {
    a[i] += rest[i], b[i] += a[i];
    for (int lane = 0; lane < LANES; lane++) {
      all = (all ^ a[i][lane]) * 0x9E3779B97F4A7C15u;
      all = (all ^ all >> 29 ^ b[i][lane]) * 0xBF58476D1CE4E5B9u;
    }
  }
  return all;
}

uint64_t nm_checksum(const char *bytes, long n) {
  enum { PARTS = 32 };
  if (n <= 1 << 18) return checksum_part(bytes, n);
  uint64_t parts[PARTS], all = n;
#pragma omp parallel for schedule(static)
  for (long i = 0; i < PARTS; i++) {
    long from = n / PARTS * i, to = i == PARTS - 1 ? n : n / PARTS * (i + 1);
    parts[i] = checksum_part(bytes + from, to - from);
  }
  for (int i = 0; i < PARTS; i++) all = (all ^ all >> 29 ^ parts[i]) * 0x9E3779B97F4A7C15u;
  return all;
}

/* ---- all weights of a block of training at once ------------------------------------------------------------------------- */

typedef struct {
  const float *w;
  float *masked;
  uint8_t *mask;
  long outer, inner;
  int group, keep;
  uint64_t checksum; /* of w; from here on what is found */
  int nan;
} choice_t;

void nm_choose(choice_t *all, long count, int sum_up) {
  for (choice_t *c = all; c < all + count; c++) {
    if (sum_up) c->checksum = nm_checksum((const char *)c->w, c->outer * c->group * c->inner * sizeof(float));
    c->nan = nm_select(c->w, c->outer, c->group, c->inner, c->keep, c->masked, c->mask);
  }
}
