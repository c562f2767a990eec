/* y = softmax(q k^T / sqrt(D)) v in fp32, queries along the lanes. A tile is up to QUERIES vectors of queries of one head;
 * its scores, (keys, queries), stay in L2; k and v are broadcast by memory operands, from where they lie. */
#include "vectors.h"

#define QUERIES (LANES == 8 ? 2 : 4) /* vectors of queries */

typedef struct {
  const float *q, *k, *v; /* (B, H, L, D), all with these strides; D is contiguous and a multiple of LANES */
  float *y;               /* (B, L, H * D), contiguous */
  long B, H, L, D, stride_b, stride_h, stride_l;
} attention_t;

/* out[p][r] = sum over n of a[n * step_n + p * step_p] * tile[n][r] */
INLINE void product(int R, int P, const float *a, long step_n, long step_p, const float *tile, long n, float *out) {
  vec s[24];
  UNROLL for (int i = 0; i < P * R; i++) s[i] = (vec){0};
  for (long k = 0; k < n; k++, a += step_n, tile += R * LANES) {
    vec x[QUERIES];
    UNROLL for (int r = 0; r < R; r++) x[r] = *(const vec *)(tile + r * LANES);
    UNROLL for (int p = 0; p < P; p++) {
      vec w = splat(a[p * step_p]);
      UNROLL for (int r = 0; r < R; r++) s[p * R + r] += w * x[r];
    }
  }
  UNROLL for (int i = 0; i < P * R; i++) *(vec *)(out + i * LANES) = s[i];
}

INLINE void products(int R, const float *a, long step_n, long step_p, const float *tile, long n, float *out, long rows) {
  long i = 0;
  if (R > 2) {
    for (; i + 6 <= rows; i += 6) product(R, 6, a + i * step_p, step_n, step_p, tile, n, out + i * R * LANES);
  } else if (R == 2) {
    for (; i + 6 <= rows; i += 6) product(2, 6, a + i * step_p, step_n, step_p, tile, n, out + i * R * LANES);
  } else {
    for (; i + 8 <= rows; i += 8) product(1, 8, a + i * step_p, step_n, step_p, tile, n, out + i * R * LANES);
  }
  for (; i < rows; i++) product(R, 1, a + i * step_p, step_n, step_p, tile, n, out + i * R * LANES);
}

/* s (keys, queries) -> e^(s - largest of the query), whose sums it returns. A NaN makes all of its query NaN. */
INLINE void exponentials(int R, float *s, long L, vec *sum) {
  vec top[QUERIES];
  UNROLL for (int r = 0; r < R; r++) top[r] = *(vec *)(s + r * LANES), sum[r] = (vec){0};
  for (long j = 1; j < L; j++) {
    UNROLL for (int r = 0; r < R; r++) top[r] = max(top[r], *(vec *)(s + (j * R + r) * LANES));
  }
  for (long j = 0; j < L; j++) {
    UNROLL for (int r = 0; r < R; r++) {
      vec *at = (vec *)(s + (j * R + r) * LANES);
      *at = exp2_of(max(splat(-125.f), *at - top[r]));
      sum[r] += *at;
    }
  }
}

INLINE void queries(int R, const attention_t *p, long from, long offset, int have, float *y, float *tile) {
  long D = p->D, step = p->stride_l;
  float *s = tile + D * R * LANES, *o = s + p->L * R * LANES;
  const float *q = p->q + offset + from * step;
  float scale = 1.4426950408889634f / sqrtf(D); /* powers are of 2 */
  vec sum[QUERIES];
  for (int r = 0; r < R; r++)
    for (long d = 0; d < D; d += LANES) {
      vec v[LANES];
      UNROLL for (int i = 0; i < LANES; i++)
        v[i] = r * LANES + i < have ? (vec)(load(q + (r * LANES + i) * step + d) * scale) : (vec){0};
      transpose(v);
      UNROLL for (int i = 0; i < LANES; i++) *(vec *)(tile + ((d + i) * R + r) * LANES) = v[i];
    }
  products(R, p->k + offset, 1, step, tile, D, s, p->L);
  exponentials(R, s, p->L, sum);
  products(R, p->v + offset, step, 1, s, p->L, o, D);
  for (int r = 0; r < R; r++)
    for (long d = 0; d < D; d += LANES) {
      vec v[LANES];
      UNROLL for (int i = 0; i < LANES; i++) v[i] = *(vec *)(o + ((d + i) * R + r) * LANES) / sum[r];
      transpose(v);
      for (int i = 0; i < LANES && r * LANES + i < have; i++) store(y + (r * LANES + i) * p->H * D + d, v[i]);
    }
}

/* Returns 0, or 1 where there is no memory. */
int nm_attention(const attention_t *p) {
  long vectors = (p->L + LANES - 1) / LANES, each = (vectors + QUERIES - 1) / QUERIES, tiles = p->B * p->H * each;
  int failed = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : failed) if (tiles > 1)
  for (long i = 0; i < tiles; i++) {
    long part = i % each, h = i / each % p->H, b = i / each / p->H, offset = b * p->stride_b + h * p->stride_h;
    long first = vectors * part / each, R = vectors * (part + 1) / each - first, from = first * LANES;
    float *tile = scratch(TILES, (2 * p->D + p->L) * QUERIES * LANES), *y = p->y + ((b * p->L + from) * p->H + h) * p->D;
    int have = least(p->L - from, R * LANES);
    if (!tile) failed |= 1;
    else if (R == 1) queries(1, p, from, offset, have, y, tile);
    else if (R == 2) queries(2, p, from, offset, have, y, tile);
#if LANES != 8
    else if (R == 3) queries(3, p, from, offset, have, y, tile);
    else queries(4, p, from, offset, have, y, tile);
#endif
  }
  return failed;
}
