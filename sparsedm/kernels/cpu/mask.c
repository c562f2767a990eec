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
    *(bytes *)(mask + i * LANES) = __builtin_convertvector(kept[i], bytes) & 1;
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

INLINE int select_groups(const float *w, long outer, int group, long inner, int keep, float *masked, uint8_t *mask) {
  long blocks = inner == 1 ? outer / LANES : outer;
  int found = 0;
#pragma omp parallel for schedule(static) reduction(| : found) if (outer * group * inner > 1 << 15)
  for (long b = 0; b < blocks; b++) {
    ivec nan = {0};
    if (inner == 1) {
      long at = b * LANES * group;
      select_block(w + at, group, keep, masked + at, mask + at, &nan);
    } else
      for (long t = 0; t < inner; t += LANES) {
        long at = b * group * inner + t;
        select_taps(w + at, group, inner, keep, least(inner - t, LANES), masked + at, mask + at, &nan);
      }
    found |= any(nan);
  }
  if (inner == 1 && outer % LANES) {
    float rest[32 * LANES] = {0}, masked_rest[32 * LANES];
    uint8_t mask_rest[32 * LANES];
    long at = blocks * LANES * group, n = outer % LANES * group;
    ivec nan = {0};
    memcpy(rest, w + at, n * sizeof(float));
    select_block(rest, group, keep, masked_rest, mask_rest, &nan);
    memcpy(masked + at, masked_rest, n * sizeof(float));
    memcpy(mask + at, mask_rest, n);
    found |= any(nan);
  }
  return found;
}

/* w (outer, group, inner) -> masked = w * mask, and mask of bytes 0 or 1. Returns whether a weight is NaN. */
int nm_select(const float *w, long outer, int group, long inner, int keep, float *masked, uint8_t *mask) {
  switch (group) {
    case 2: return select_groups(w, outer, 2, inner, keep, masked, mask);
    case 4: return select_groups(w, outer, 4, inner, keep, masked, mask);
    case 8: return select_groups(w, outer, 8, inner, keep, masked, mask);
    case 16: return select_groups(w, outer, 16, inner, keep, masked, mask);
    default: return select_groups(w, outer, 32, inner, keep, masked, mask);
  }
}

/* out = g + decay * (w - masked) */
void nm_decay(const float *g, const float *w, const float *masked, float decay, long n, float *out) {
#pragma omp parallel for schedule(static) if (n > 1 << 15)
  for (long i = 0; i < n; i++) out[i] = fmaf(decay, w[i] - masked[i], g[i]);
}
