/* N:M sparse layers in fp32: y = act(x W^T + b) s + r, and the same of a convolution, without im2col.
 *
 * Tokens, or pixels of the output, lie along the lanes. A tile is up to VECTORS vectors of them. The K axis goes by
 * blocks of KB columns; each column is a row of the tile, in L1. For each output channel n and each of its kept weights:
 *
 *     sum[n][:] += value * tile[column][:]
 *
 * A column is kept as the byte offset of its row of the tile, 16 bits. Any N:M has the same count of kept weights in
 * every block, because groups divide KB. `nm_prepack` brings values and offsets into the order in which they are read.
 *
 * A convolution flattens K as (tap, channel). NCHW costs least: neighbours of the output are neighbours of the input,
 * so that a vector is one load, without the lanes that fall over a border. NHWC is transposed as tokens are.
 */
#include "vectors.h"

#define VECTORS (LANES == 16 ? 8 : 12)
#define SUMS 12 /* registers for sums at most, where several rows of W share a turn */
#define KB 64   /* columns whose tile stays in L1 */
#define NB 256  /* rows of W whose sums stay in L2 */
#define HALO_BYTES (LANES == 16 ? 40960 : 32768)
#define ROOM(K) (K + 3) /* for a row of W that is filled up to fours */
enum { STRIDE = VECTORS * LANES };
enum { NONE, GELU, GELU_TANH, SILU };

/* Where results go: y = act(sum + bias) * scale + residual. Rows of `scale` serve `per` rows of y each. */
typedef struct {
  const float *bias, *scale, *residual;
  float *y;
  long ld_residual, ldy, per, N;
  int act;
} out_t;

typedef struct {
  const float *x, *skip; /* (M, K1) and (M, K2): the columns of W in turn; skip may be NULL */
  const float *values;
  const void *offsets; /* uint16, or uint8 for nm_linear_few */
  const uint8_t *counts; /* of values in each block and row, if they differ, see prepack_transposed; else NULL */
  long ldx, ld_skip, M, K1, K2;
  int keep, group;
  out_t out;
} linear_t;

typedef struct {
  const float *x, *values;
  const uint16_t *offsets;
  long B, C, H, W, OH, OW;
  int kh, kw, stride, top, left, keep, group, nhwc; /* nhwc: of x, y and residual */
  out_t out;
} conv_t;

/* ---- the inner loop: `count` rows of W, P at a time, R vectors, nz weights of each row, or where P is 1 and there are
 * counts, so many and a multiple of four. Returns the end of v. -------------------------------------------------------- */

INLINE const float *rows(int R, int P, const float *tile, const float *v, const uint16_t *o, int nz,
                         const uint8_t *counts, float *sums, int count, int first) {
  uint64_t ahead[SUMS] = {0};
  int fours = counts ? KB : nz / 4 * 4;
  if (count < P) return v;
  /* offsets are read four at a time, and one quadruple ahead: multiply-adds must not wait for their addresses */
  if (fours) {
    UNROLL for (int p = 0; p < P; p++) memcpy(ahead + p, o + p * nz, 8);
  }
  for (int n = 0; n + P <= count; n += P, v += P * nz, o += P * nz, sums += P * STRIDE) {
    vec a[SUMS];
    if (counts) fours = nz = counts[n];
    const uint16_t *after = n + 2 * P <= count ? o + P * nz : o; /* the last rows read their own again */
    UNROLL for (int p = 0; p < P; p++) {
      UNROLL for (int r = 0; r < R; r++) a[p * R + r] = (vec){0};
    }
    for (int j = 0; j < fours; j += 4) {
      uint64_t offset[SUMS];
      vec quad[SUMS];
      UNROLL for (int p = 0; p < P; p++) {
        offset[p] = ahead[p];
        const uint16_t *next = (j + 4 == fours ? after : o + j + 4) + p * nz;
        memcpy(ahead + p, next, 8);
        quad[p] = QUAD(v + p * nz + j);
      }
#define ONE(i)                                                                          \
  UNROLL for (int p = 0; p < P; p++) {                                                  \
    const vec *x = (const vec *)((const char *)tile + (uint16_t)(offset[p] >> 16 * i)); \
    vec w = SPREAD(quad[p], v + p * nz + j, i);                                         \
    UNROLL for (int r = 0; r < R; r++) a[p * R + r] += x[r] * w;                        \
  }
      ONE(0) ONE(1) ONE(2) ONE(3)
    }
    for (int j = fours; j < nz; j++) {
      UNROLL for (int p = 0; p < P; p++) {
        const vec *x = (const vec *)((const char *)tile + o[p * nz + j]);
        vec w = splat(v[p * nz + j]);
        UNROLL for (int r = 0; r < R; r++) a[p * R + r] += x[r] * w;
      }
    }
    /* a block's sum is added when it is whole: one long chain of additions would round more than the dense product */
    UNROLL for (int p = 0; p < P; p++) {
      UNROLL for (int r = 0; r < R; r++) {
        vec *sum = (vec *)(sums + p * STRIDE + r * LANES);
        if (!first) a[p * R + r] += *sum;
        *sum = a[p * R + r];
      }
    }
  }
  return v;
}

#define TILE(R, P)                                                                                                     \
  static const float *rows_##R(const float *tile, const float *v, const uint16_t *o, int nz, const uint8_t *counts,    \
                               float *sums, int n, int first) {                                                        \
    int even = counts ? 0 : n / P * P;                                                                                 \
    if (P > 1) rows(R, P, tile, v, o, nz, 0, sums, even, first);                                                       \
    else even = 0;                                                                                                     \
    return rows(R, 1, tile, v + even * nz, o + even * nz, nz, counts, sums + even * STRIDE, n - even, first);          \
  }
/* AVX2 has 16 registers: the sums and values of P rows have to fit */
enum { P_OF_1 = LANES == 8 ? 6 : 8, P_OF_3 = LANES == 8 ? 3 : 4 };
TILE(1, P_OF_1) TILE(2, 4) TILE(3, P_OF_3) TILE(4, 2) TILE(5, 2) TILE(6, 2) TILE(7, 1) TILE(8, 1)
TILE(9, 1) TILE(10, 1) TILE(11, 1) TILE(12, 1)
static const float *(*const rows_of[])(const float *, const float *, const uint16_t *, int, const uint8_t *, float *,
                                       int, int) = {
    0, rows_1, rows_2, rows_3, rows_4, rows_5, rows_6, rows_7, rows_8, rows_9, rows_10, rows_11, rows_12};

/* ---- write-out ----------------------------------------------------------------------------------------------------- */

/* x Phi(x). Phi(-z) = 2^(polynomial in z), z = |x|, fitted to an absolute error of z Phi(-z) of 6e-9; from 7 on it is 0 */
INLINE vec gelu(vec x) {
  vec size = (vec)((ivec)x & 0x7fffffff), z = min(size, splat(7.f));
  vec p = splat(1.9539477591479226e-7f);
  p = p * z - 4.634710421669297e-6f;
  p = p * z + 4.348322909208946e-5f;
  p = p * z - 1.764629705576226e-4f;
  p = p * z - 2.0069022139068693e-4f;
  p = p * z + 7.1879792958498e-3f;
  p = p * z - 5.261310189962387e-2f;
  p = p * z - 4.591539800167084e-1f;
  p = p * z - 1.1511162519454956f;
  p = p * z - 0.9999992847442627f;
  vec tail = (vec)((ivec)exp2_of(p) & (size < 7.f));
  ivec above = x > 0.f;
  return x * (vec)((above & (ivec)(1.f - tail)) | (~above & (ivec)tail));
}
/* x / (1 + e^(-u)) */
INLINE vec gated(vec x, vec u) {
  vec t = u * -1.4426950409f;
  return x / (exp2_of(max(splat(-126.f), min(splat(128.f), t))) + 1.f);
}
INLINE vec activated(vec v, int act) {
  if (act == GELU) return gelu(v);
  if (act == GELU_TANH) return gated(v, v * (v * v * 0.0713548162726f + 1.5957691216057f));
  return act == SILU ? gated(v, v) : v;
}

/* sums (n, STRIDE), vectors of `have` tokens, to y (tokens, n) from token `row`, column `from` on. A row of y after the
 * other: lines written by turns would share few sets of L1. */
INLINE void write_rows(const out_t *out, const float *sums, int have, long row, int from, int n, int act) {
  float *y = out->y + row * out->ldy + from;
  const float *residual = out->residual ? out->residual + row * out->ld_residual + from : 0, *scale[LANES];
  if (out->scale)
    for (int j = 0; j < have; j++) scale[j] = out->scale + (row + j) / out->per * out->N + from;
  for (int i = 0; i < n; i += LANES) {
    lanes m = some(n - i >= LANES ? ALL : (1u << (n - i)) - 1);
    int whole = have == LANES && n - i >= LANES;
    vec v[LANES], b = out->bias ? load_some(out->bias + from + i, m) : (vec){0};
    UNROLL for (int j = 0; j < LANES; j++) v[j] = *(const vec *)(sums + (i + j) * STRIDE);
    transpose(v);
    if (whole && !out->scale) {
      UNROLL for (int j = 0; j < LANES; j++) {
        vec u = activated(v[j] + b, act);
        if (residual) u += load(residual + j * out->ld_residual + i);
        store(y + j * out->ldy + i, u);
      }
    } else
      for (int j = 0; j < have; j++) {
        vec u = activated(v[j] + b, act);
        if (out->scale) u *= load_some(scale[j] + i, m);
        if (residual) u += load_some(residual + j * out->ld_residual + i, m);
        store_some(y + j * out->ldy + i, m, u);
      }
  }
}
static void write_tile(const out_t *out, const float *sums, int have, int R, long row, int from, int n) {
  for (int r = 0; r < R; r++, have -= LANES, row += LANES, sums += LANES) {
    int count = least(have, LANES);
    if (out->act == GELU) write_rows(out, sums, count, row, from, n, GELU);
    else if (out->act == GELU_TANH) write_rows(out, sums, count, row, from, n, GELU_TANH);
    else if (out->act == SILU) write_rows(out, sums, count, row, from, n, SILU);
    else write_rows(out, sums, count, row, from, n, NONE);
  }
}

/* ---- linear -------------------------------------------------------------------------------------------------------- */

/* x (tokens, K) -> tile (K, STRIDE). Tokens beyond `have` are zero, and up to LANES - 1 rows behind the K too. */
static void pack_rows(const float *x, long ldx, int have, int R, long K, float *tile) {
  for (int r = 0; r < R; r++, have -= LANES, x += LANES * ldx) {
    float *to = tile + r * LANES;
    for (long k = 0; k < K; k += LANES) {
      vec v[LANES];
      if (have >= LANES && K - k >= LANES) {
        UNROLL for (int i = 0; i < LANES; i++) v[i] = load(x + i * ldx + k);
      } else {
        lanes m = some(K - k >= LANES ? ALL : (1u << (K - k)) - 1);
        UNROLL for (int i = 0; i < LANES; i++) v[i] = i < have ? load_some(x + i * ldx + k, m) : (vec){0};
      }
      transpose(v);
      UNROLL for (int i = 0; i < LANES; i++) *(vec *)(to + (k + i) * STRIDE) = v[i];
    }
  }
}

static void linear_tile(const linear_t *p, long row, int have, int R, float *tile) {
  long K = p->K1 + p->K2, N = p->out.N;
  const float *v = p->values;
  const uint16_t *o = p->offsets;
  const uint8_t *counts = p->counts;
  float *sums = tile + (K + LANES) * STRIDE;
  pack_rows(p->x + row * p->ldx, p->ldx, have, R, p->K1, tile);
  if (p->skip) pack_rows(p->skip + row * p->ld_skip, p->ld_skip, have, R, p->K2, tile + p->K1 * STRIDE);
  for (long n0 = 0; n0 < N; n0 += NB) {
    int n = least(N - n0, NB);
    if (counts) v = p->values + n0 * ROOM(K), o = (const uint16_t *)p->offsets + n0 * ROOM(K);
    for (long k0 = 0; k0 < K; k0 += KB) {
      int nz = least(K - k0, KB) * p->keep / p->group;
      const float *end = rows_of[R](tile + k0 * STRIDE, v, o, nz, counts, sums, n, k0 == 0);
      o += end - v, v = end, counts += counts ? n : 0;
    }
    write_tile(&p->out, sums, have, R, row, n0, n);
  }
}

/* The exported products (nm_linear..., nm_conv..., nm_attention) return 0, or 1 where there is no memory. */
int nm_linear(const linear_t *p) {
  long vectors = (p->M + LANES - 1) / LANES, tiles = count_tiles(vectors, VECTORS);
  int failed = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : failed) if (tiles > 1)
  for (long i = 0; i < tiles; i++) {
    long from = vectors * i / tiles, R = vectors * (i + 1) / tiles - from, row = from * LANES;
    float *tile = scratch(TILES, (p->K1 + p->K2 + LANES + NB) * STRIDE);
    if (tile) linear_tile(p, row, least(p->M - row, R * LANES), R, tile);
    failed |= !tile;
  }
  return failed;
}

/* ---- few rows: outputs along the lanes, so that a weight is read once -------------------------------------------------
 *
 * For LANES rows of W and each window of columns: the kept weights of all lanes one after the other, a vector of values
 * and a vector of places in the window. A window is four columns, repeated over a register, from which a shuffle within
 * 128 bits picks; or LANES columns, from which a slower one picks; or one group, if it is larger, which is gathered. */

enum { QUADS, WINDOWS, GATHERS };
INLINE int window_of(int group) { return group <= 4 ? 4 : group <= LANES ? LANES : group; }

/* sums of T rows of x and B blocks of LANES outputs, from row `row` and output n on */
static __attribute__((noinline)) void write_few(const out_t *out, const vec *sums, int T, int B, long row, long n) {
  for (int i = 0; i < T * B; i++) {
    long at = n + i / T * LANES, m = row + i % T;
    lanes in = some(out->N - at >= LANES ? ALL : (1u << (out->N - at)) - 1);
    vec u = sums[i];
    if (out->bias) u += load_some(out->bias + at, in);
    u = activated(u, out->act);
    if (out->scale) u *= load_some(out->scale + m / out->per * out->N + at, in);
    if (out->residual) u += load_some(out->residual + m * out->ld_residual + at, in);
    store_some(out->y + m * out->ldy + at, in, u);
  }
}

INLINE void few_rows(int T, int B, int way, const linear_t *p, const float *x, long ldx, long row, long n) {
  long K = p->K1 + p->K2, kept = K * p->keep / p->group;
  int window = window_of(p->group), nz = window * p->keep / p->group;
  const float *v = p->values + n * kept;
  const uint8_t *o = (const uint8_t *)p->offsets + n * kept;
  vec a[8];
  UNROLL for (int i = 0; i < T * B; i++) a[i] = (vec){0};
  for (long left = kept; left > 0; left -= nz, x += window) {
    vec xs[4];
    UNROLL for (int t = 0; t < T; t++) xs[t] = way == QUADS ? QUAD(x + t * ldx) : load(x + t * ldx);
    for (int j = 0; j < nz && j < left; j++, v += LANES, o += LANES) {
      UNROLL for (int b = 0; b < B; b++) {
        ivec index = widen(o + b * kept * LANES);
        vec w = load(v + b * kept * LANES);
        UNROLL for (int t = 0; t < T; t++) {
          vec chosen = way == QUADS     ? pick_quad(xs[t], index)
                       : way == WINDOWS ? pick(xs[t], index)
                                        : gather_some(x + t * ldx, index, some(ALL));
          a[b * T + t] += w * chosen;
        }
      }
    }
  }
  write_few(&p->out, a, T, B, row, n);
}

#define FEW(T, B)                                                                              \
  static void few_##T##_##B(const linear_t *p, const float *x, long ldx, long row, long n) {   \
    if (p->group <= 4) few_rows(T, B, QUADS, p, x, ldx, row, n);                               \
    else if (p->group <= LANES) few_rows(T, B, WINDOWS, p, x, ldx, row, n);                    \
    else few_rows(T, B, GATHERS, p, x, ldx, row, n);                                           \
  }
FEW(1, 1) FEW(1, 4) FEW(2, 1) FEW(2, 4) FEW(4, 1) FEW(4, 2)

/* `blocks` blocks of LANES rows of W from row n on, all rows of x */
static void few_blocks(const linear_t *p, const float *x, long ldx, long n, int blocks) {
  long m = 0;
  for (; m + 4 <= p->M; m += 4) {
    int b = 0;
    for (; b + 2 <= blocks; b += 2) few_4_2(p, x + m * ldx, ldx, m, n + b * LANES);
    if (b < blocks) few_4_1(p, x + m * ldx, ldx, m, n + b * LANES);
  }
  for (; m < p->M; m += 2) {
    int two = m + 2 <= p->M;
    if (blocks == 4) (two ? few_2_4 : few_1_4)(p, x + m * ldx, ldx, m, n);
    else
      for (int b = 0; b < blocks; b++) (two ? few_2_1 : few_1_1)(p, x + m * ldx, ldx, m, n + b * LANES);
  }
}

int nm_linear_few(const linear_t *p) {
  long ldx = p->K1 + p->K2 + 32, blocks = (p->out.N + LANES - 1) / LANES;
  float *x = scratch(TILES, p->M * ldx); /* both sources in one row each, and zeros behind, which a window may read */
  if (!x) return 1;
  for (long m = 0; m < p->M; m++) {
    memcpy(x + m * ldx, p->x + m * p->ldx, p->K1 * sizeof(float));
    if (p->skip) memcpy(x + m * ldx + p->K1, p->skip + m * p->ld_skip, p->K2 * sizeof(float));
    memset(x + m * ldx + ldx - 32, 0, 32 * sizeof(float));
  }
#pragma omp parallel for schedule(dynamic) if (blocks > 8)
  for (long b = 0; b < blocks; b += 4) few_blocks(p, x, ldx, b * LANES, least(blocks - b, 4));
  return 0;
}

/* ---- convolution, the general way: any kernel size, stride, padding and size ------------------------------------------ */

/* one vector of outputs: image b, first output pixel p, `have` lanes; it never straddles two images */
typedef struct {
  long b, p;
  int have;
} place_t;

/* Where the lanes of a vector of outputs read at a tap: pixels of the input, as far as they are inside (the result). */
INLINE uint32_t reads(const conv_t *c, const place_t *at, int dy, int dx, int *pixel) {
  uint32_t inside = 0;
  long oy = at->p / c->OW, ox = at->p % c->OW;
  for (int i = 0; i < LANES; i++) {
    long iy = oy * c->stride + dy, ix = ox * c->stride + dx;
    int in = i < at->have && iy >= 0 && iy < c->H && ix >= 0 && ix < c->W;
    inside |= (uint32_t)in << i;
    pixel[i] = in ? iy * c->W + ix : 0;
    if (++ox == c->OW) ox = 0, oy++;
  }
  return inside;
}

/* `run` channels from ch on, at one tap, NCHW. Channel by channel: planes may lie 4 KB apart. */
static void pack_planes(const conv_t *c, const place_t *at, int R, int dy, int dx, long ch, int run, float *to) {
  long plane = c->H * c->W, from[VECTORS];
  ivec pixel[VECTORS];
  lanes in[VECTORS], low[VECTORS], high[VECTORS];
  int whole = c->stride == 1 && c->OW == c->W, halved = c->stride == 2 && c->OW % LANES == 0;
  for (int r = 0; r < R; r++) {
    uint32_t inside = reads(c, at + r, dy, dx, (int *)(pixel + r));
    long iy = at[r].p / c->OW * c->stride + dy, ix = at[r].p % c->OW * c->stride + dx;
    uint64_t row = 0; /* the lanes inside, of the two vectors of which `halved` takes every second lane */
    for (int i = 0; i < 2 * LANES; i++) row |= (uint64_t)(iy >= 0 && iy < c->H && ix + i >= 0 && ix + i < c->W) << i;
    in[r] = some(inside), low[r] = some(row & ALL), high[r] = some(row >> LANES);
    from[r] = (at[r].b * c->C + ch) * plane + (whole || halved ? iy * c->W + ix : 0);
  }
  for (int j = 0; j < run; j++, to += STRIDE)
    for (int r = 0; r < R; r++) {
      const float *x = c->x + from[r] + j * plane;
      vec v;
      if (whole) v = load_some(x, in[r]);
      else if (halved) v = SHUFFLE(load_some(x, low[r]), load_some(x + LANES, high[r]), EVEN);
      else v = gather_some(x, pixel[r], in[r]);
      *(vec *)(to + r * LANES) = v;
    }
}

/* the same, NHWC */
static void pack_pixels(const conv_t *c, const place_t *at, int R, int dy, int dx, long ch, int run, float *to) {
  static const float zeros[KB + LANES];
  for (int r = 0; r < R; r++, to += LANES) {
    const float *from[LANES];
    int pixel[LANES];
    uint32_t inside = reads(c, at + r, dy, dx, pixel);
    for (int i = 0; i < LANES; i++)
      from[i] = inside >> i & 1 ? c->x + (at[r].b * c->H * c->W + pixel[i]) * c->C + ch : zeros;
    for (int j = 0; j < run; j += LANES) {
      vec v[LANES];
      int n = least(run - j, LANES);
      if (n == LANES) {
        UNROLL for (int i = 0; i < LANES; i++) v[i] = load(from[i] + j);
      } else {
        UNROLL for (int i = 0; i < LANES; i++) v[i] = load_some(from[i] + j, some((1u << n) - 1));
      }
      transpose(v);
      for (int i = 0; i < n; i++) *(vec *)(to + (j + i) * STRIDE) = v[i];
    }
  }
}

static void pack_conv(const conv_t *c, const place_t *at, int R, long k0, int cols, float *tile) {
  for (int k = 0; k < cols;) {
    long tap = (k0 + k) / c->C, ch = (k0 + k) % c->C;
    int run = least(c->C - ch, cols - k), dy = tap / c->kw - c->top, dx = tap % c->kw - c->left;
    (c->nhwc ? pack_pixels : pack_planes)(c, at, R, dy, dx, ch, run, tile + k * STRIDE);
    k += run;
  }
}

INLINE void write_planes(const conv_t *c, const float *sums, const place_t *at, int R, int act) {
  const out_t *out = &c->out;
  for (long n = 0; n < out->N; n++, sums += STRIDE)
    for (int r = 0; r < R; r++) {
      long to = (at[r].b * out->N + n) * c->OH * c->OW + at[r].p;
      vec v = activated(*(const vec *)(sums + r * LANES) + (out->bias ? out->bias[n] : 0.f), act);
      if (at[r].have == LANES) {
        if (out->residual) v += load(out->residual + to);
        store(out->y + to, v);
      } else {
        lanes m = some((1u << at[r].have) - 1);
        if (out->residual) v += load_some(out->residual + to, m);
        store_some(out->y + to, m, v);
      }
    }
}
static void write_conv(const conv_t *c, const float *sums, const place_t *at, int R) {
  if (c->nhwc)
    for (int r = 0; r < R; r++)
      write_tile(&c->out, sums + r * LANES, at[r].have, 1, at[r].b * c->OH * c->OW + at[r].p, 0, c->out.N);
  else if (c->out.act == GELU) write_planes(c, sums, at, R, GELU);
  else if (c->out.act == GELU_TANH) write_planes(c, sums, at, R, GELU_TANH);
  else if (c->out.act == SILU) write_planes(c, sums, at, R, SILU);
  else write_planes(c, sums, at, R, NONE);
}

static void conv_tile(const conv_t *c, const place_t *at, int R, float *tile) {
  long K = (long)c->kh * c->kw * c->C;
  const float *v = c->values;
  const uint16_t *o = c->offsets;
  float *sums = tile + (KB + LANES) * STRIDE;
  for (long k0 = 0; k0 < K; k0 += KB) {
    int cols = least(K - k0, KB), nz = cols * c->keep / c->group;
    pack_conv(c, at, R, k0, cols, tile);
    rows_of[R](tile, v, o, nz, 0, sums, c->out.N, k0 == 0);
    v += c->out.N * nz, o += c->out.N * nz;
  }
  write_conv(c, sums, at, R);
}

int nm_conv(const conv_t *c) {
  long pixels = c->OH * c->OW, each = (pixels + LANES - 1) / LANES, vectors = each * c->B;
  long tiles = count_tiles(vectors, VECTORS);
  int failed = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : failed) if (tiles > 1)
  for (long i = 0; i < tiles; i++) {
    long from = vectors * i / tiles, R = vectors * (i + 1) / tiles - from;
    float *tile = scratch(TILES, (KB + c->out.N + 2 * LANES) * STRIDE);
    place_t at[VECTORS];
    for (int r = 0; r < R; r++) {
      long p = (from + r) % each * LANES;
      at[r] = (place_t){(from + r) / each, p, least(pixels - p, LANES)};
    }
    if (tile) conv_tile(c, at, R, tile);
    failed |= !tile;
  }
  return failed;
}

/* ---- convolution, the halo way: 3 x 3, stride 1, as large as x, W a multiple of LANES -----------------------------------
 *
 * Each row of the input lies in the tile three times, shifted by -1, 0 and 1 pixels, and the taps dy are offsets of
 * whole vectors. So CB channels x 9 taps are one K block: a third of the packing, fewer turns of the sums through L2.
 * The tile is (channel, dx, row) with `slots` vectors a copy; offsets therefore depend on W. */

static int slots_of(long W) {
  long per = W / LANES, high = per ? VECTORS / per : 0;
  return W % LANES || high < 1 ? 0 : (high + 2) * per;
}
/* channels of a K block; 0 where this way does not serve */
int nm_halo_channels(long W, int group) {
  int slots = slots_of(W), most = slots ? least(32, HALO_BYTES / (3 * slots * LANES * 4)) : 0;
  if (most > LANES) most -= most % LANES; /* so many at a time are transposed */
  return most / group * group;
}

/* copy 1 of a channel (dx = 0) -> copies 0 (dx = -1) and 2 (dx = 1) */
static void shift_copies(float *copies, int slots, int per) {
  const float *middle = copies + slots * LANES;
  for (int s = 0; s < slots; s++) {
    const float *from = middle + s * LANES;
    lanes l = some(s % per == 0 ? ALL - 1 : ALL), r = some(s % per == per - 1 ? ALL >> 1 : ALL);
    *(vec *)(copies + s * LANES) = load_some(from - 1, l);
    *(vec *)(copies + (2 * slots + s) * LANES) = load_some(from + 1, r);
  }
}

static void pack_halo(const conv_t *c, const place_t *at, int slots, long c0, int cols, float *tile) {
  int per = c->W / LANES;
  long y0 = at->p / c->W, copy = 3 * slots * LANES;
  for (int ch = 0; ch < cols; ch += c->nhwc ? LANES : 1)
    for (int s = 0; s < slots; s++) {
      long iy = y0 - 1 + s / per, ix = s % per * LANES;
      int in = iy >= 0 && iy < c->H, n = c->nhwc ? least(cols - ch, LANES) : 1;
      float *to = tile + ch * copy + (slots + s) * LANES;
      vec v[LANES];
      if (!in) {
        for (int q = 0; q < n; q++) v[q] = (vec){0};
      } else if (!c->nhwc) {
        v[0] = load(c->x + ((at->b * c->C + c0 + ch) * c->H + iy) * c->W + ix);
      } else {
        const float *from = c->x + ((at->b * c->H + iy) * c->W + ix) * c->C + c0 + ch;
        lanes m = some(n == LANES ? ALL : (1u << n) - 1);
        UNROLL for (int q = 0; q < LANES; q++) v[q] = load_some(from + q * c->C, m);
        transpose(v);
      }
      for (int q = 0; q < n; q++) *(vec *)(to + q * copy) = v[q];
    }
  for (int ch = 0; ch < cols; ch++) shift_copies(tile + ch * copy, slots, per);
}

static void halo_tile(const conv_t *c, const place_t *at, int R, int slots, int CB, float *tile) {
  const float *v = c->values;
  const uint16_t *o = c->offsets;
  float *sums = tile + 3 * CB * slots * LANES;
  for (long c0 = 0; c0 < c->C; c0 += CB) {
    int cols = least(c->C - c0, CB), nz = 9 * cols * c->keep / c->group;
    pack_halo(c, at, slots, c0, cols, tile);
    rows_of[R](tile, v, o, nz, 0, sums, c->out.N, c0 == 0);
    v += c->out.N * nz, o += c->out.N * nz;
  }
  write_conv(c, sums, at, R);
}

int nm_conv_halo(const conv_t *c) {
  int per = c->W / LANES, slots = slots_of(c->W), CB = nm_halo_channels(c->W, c->group), failed = 0;
  long most = VECTORS / per, each = c->B > 1 ? (c->H + most - 1) / most : count_tiles(c->H, most), tiles = each * c->B;
#pragma omp parallel for schedule(dynamic) reduction(| : failed) if (tiles > 1)
  for (long i = 0; i < tiles; i++) {
    long b = i / each, y0 = c->H * (i % each) / each, R = (c->H * (i % each + 1) / each - y0) * per;
    float *tile = scratch(TILES, 3 * CB * slots * LANES + (c->out.N + LANES) * STRIDE);
    place_t at[VECTORS];
    for (int r = 0; r < R; r++) at[r] = (place_t){b, y0 * c->W + r * LANES, LANES};
    if (tile) halo_tile(c, at, R, slots, CB, tile);
    failed |= !tile;
  }
  return failed;
}

/* ---- prepacking: masked w (N, taps, C) and its mask into the order in which a loop reads values and offsets -------------- */

enum { LINEAR, FEW_ROWS, CONV, HALO };

static uint8_t places[256][8]; /* of the bits that are set, and 0 */
static __attribute__((constructor)) void fill_places(void) {
  for (int b = 0; b < 256; b++)
    for (int i = 0, n = 0; i < 8; i++)
      if (b >> i & 1) places[b][n++] = i;
}

/* Writes the weights of 8 columns whose bits are set, and what comes, 8 in all; returns how many. `have`: columns that
 * may be read. Offsets grow by `step` from column to column. Masked training does this in every step: no branches. */
INLINE int append(const float *w, int have, uint32_t bits, int offset, int step, float *v, uint16_t *o) {
  const uint8_t *place = places[bits];
#if LANES == 8
  store(v, pick(have >= 8 ? load(w) : load_some(w, some((1u << have) - 1)), widen(place)));
#else
  for (int i = 0; i < 8; i++) v[i] = w[place[i]];
#endif
  for (int i = 0; i < 8; i++) o[i] = offset + place[i] * step;
  return __builtin_popcount(bits);
}

/* Writes the kept weights of `cols` <= 64 columns, nz of them. Where the mask keeps fewer, zeros at a pruned column fill
 * up: there an infinite x makes NaN of a dense product, too. Returns 1 where it keeps more. A single group may. */
static int append_kept(const float *w, const uint8_t *mask, int cols, int nz, int offset, int step, float *v,
                       uint16_t *o) {
  float values[KB + 8];
  uint16_t offsets[KB + 8];
  int used = 0, pruned = 0;
  for (int k = 0; k < cols; k += 8) {
    uint64_t bytes = 0;
    if (k + 8 <= cols) memcpy(&bytes, mask + k, 8);
    else memcpy(&bytes, mask + k, cols - k);
    uint32_t bits = bytes * 0x0102040810204080 >> 56; /* one bit of each byte */
    used += append(w + k, cols - k, bits, offset + k * step, step, values + used, offsets + used);
    uint32_t open = ~bits & (cols - k < 8 ? (1u << (cols - k)) - 1 : 0xff);
    if (open) pruned = k + __builtin_ctz(open);
  }
  if (used > nz) return 1;
  for (; used < nz; used++) values[used] = 0, offsets[used] = offset + pruned * step;
  memcpy(v, values, nz * sizeof(float));
  memcpy(o, offsets, nz * sizeof(uint16_t));
  return 0;
}

/* nb: rows of W whose blocks of columns follow each other. W is read in its order, which the CPU prefetches. */
static int prepack_blocks(const float *w, const uint8_t *mask, long N, long K, int keep, int group, long nb, float *v,
                          uint16_t *o) {
  int failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed) if (N * K > 1 << 15)
  for (long n = 0; n < N; n++) {
    long n0 = n / nb * nb, count = least(N - n0, nb);
    for (long k0 = 0; k0 < K; k0 += KB) {
      int cols = least(K - k0, KB), nz = cols * keep / group;
      long to = (n0 * K + count * k0) / group * keep + (n - n0) * nz;
      failed |= append_kept(w + n * K + k0, mask + n * K + k0, cols, nz, 0, STRIDE * sizeof(float), v + to, o + to);
    }
  }
  return failed;
}

static int prepack_halo(const float *w, const uint8_t *mask, long N, long C, int keep, int group, long W, float *v,
                        uint16_t *o) {
  int slots = slots_of(W), CB = nm_halo_channels(W, group), failed = 0;
  int vector = LANES * sizeof(float);
#pragma omp parallel for schedule(static) reduction(| : failed) if (N * C > 1 << 12)
  for (long n = 0; n < N; n++)
    for (long c0 = 0; c0 < C; c0 += CB) {
      int cols = least(C - c0, CB), nz = cols * keep / group;
      for (int tap = 0; tap < 9; tap++) {
        long from = (n * 9 + tap % 3 * 3 + tap / 3) * C + c0, to = (N * c0 / group * keep + n * nz) * 9 + tap * nz;
        int offset = (tap / 3 * slots + tap % 3 * (W / LANES)) * vector; /* tap / 3 is dx, the rest dy */
        failed |= append_kept(w + from, mask + from, cols, nz, offset, 3 * slots * vector, v + to, o + to);
      }
    }
  return failed;
}

static int prepack_few(const float *w, const uint8_t *mask, long N, long K, int keep, int group, float *v, uint8_t *o) {
  int window = window_of(group);
  long kept = K * keep / group, rounded = (N + LANES - 1) / LANES * LANES;
  uint16_t columns[32];
  float values[32];
  memset(v, 0, rounded * kept * sizeof(float));
  memset(o, 0, rounded * kept);
  for (long n = 0; n < N; n++) {
    long at = n / LANES * LANES * kept + n % LANES;
    for (long k = 0; k < K; k += window) {
      int cols = least(K - k, window), nz = cols * keep / group;
      if (append_kept(w + n * K + k, mask + n * K + k, cols, nz, 0, 1, values, columns)) return 1;
      for (int j = 0; j < nz; j++, at += LANES) v[at] = values[j], o[at] = columns[j];
    }
  }
  return 0;
}

/* v, o: N * taps * C * keep / group of them; with FEW_ROWS, N rounded up to a multiple of LANES, and o are bytes. W:
 * width of x, with HALO. Returns 1 where the columns of one `append_kept` keep more than the pattern allows. */
int nm_prepack(int order, const float *w, const uint8_t *mask, long N, long taps, long C, int keep, int group, long W,
               float *v, void *o) {
  if (order == HALO) return prepack_halo(w, mask, N, C, keep, group, W, v, o);
  if (order == FEW_ROWS) return prepack_few(w, mask, N, C, keep, group, v, o);
  return prepack_blocks(w, mask, N, taps * C, keep, group, order == LINEAR ? NB : N, v, o);
}

/* ---- masked training: a weight is prepacked and multiplied in one call, because the next step has another one ------------ */

/* W^T of a masked w (N, K) in the order of LINEAR. In a block of KB columns a row of W^T keeps any number of weights: its
 * count is rounded up to four with zeros, at a pruned column, as above, or behind the last one, where the tile is zero.
 * counts: of the rows of a block in turn, K * ceil(N / KB). v, o: ROOM(N) for each row. */
static void prepack_transposed(const float *w, long N, long K, float *v0, uint16_t *o0, uint8_t *counts0) {
  int step = STRIDE * sizeof(float);
#pragma omp parallel for schedule(static) if (N * K > 1 << 15)
  for (long k0 = 0; k0 < K; k0 += NB) {
    float *v = v0 + k0 * ROOM(N);
    uint16_t *o = o0 + k0 * ROOM(N);
    uint8_t *counts = counts0 + k0 * ((N + KB - 1) / KB);
    for (long n0 = 0; n0 < N; n0 += KB)
      for (long k = k0; k < least(K, k0 + NB); k += LANES) {
        int have = least(K - k, LANES), cols = least(N - n0, KB);
        lanes m = some((1u << have) - 1);
        vec columns[LANES][KB / LANES];
        uint64_t bits[LANES] = {0};
        for (int n = 0; n < cols; n += LANES) {
          vec x[LANES];
          const float *from = w + (n0 + n) * K + k;
          if (have == LANES && n + LANES <= cols) {
            UNROLL for (int i = 0; i < LANES; i++) x[i] = load(from + i * K);
          } else {
            UNROLL for (int i = 0; i < LANES; i++) x[i] = n + i < cols ? load_some(from + i * K, m) : (vec){0};
          }
          transpose(x);
          UNROLL for (int i = 0; i < LANES; i++) {
            columns[i][n / LANES] = x[i];
            bits[i] |= (uint64_t)bits_of(x[i] != 0.f) << n;
          }
        }
        for (int i = 0; i < have; i++) {
          const float *column = (const float *)columns[i];
          int used = 0, pruned = ~bits[i] ? __builtin_ctzll(~bits[i]) : cols;
          for (int n = 0; n < cols; n += 8)
            used += append(column + n, KB - n, bits[i] >> n & 255, n * step, step, v + used, o + used);
          for (int i = 0; i < 3; i++) v[used + i] = 0, o[used + i] = pruned * step;
          used = (used + 3) / 4 * 4;
          *counts++ = used, v += used, o += used;
        }
      }
  }
}

/* y = x W^T + b of a masked w (N, K). Returns 2 where 64 columns keep more than the pattern allows. */
int nm_linear_masked(const linear_t *p, const float *w, const uint8_t *mask) {
  long N = p->out.N, kept = N * p->K1 * p->keep / p->group;
  float *v = scratch(WEIGHTS, kept + (kept + 1) / 2);
  linear_t q = *p;
  if (!v) return 1;
  if (prepack_blocks(w, mask, N, p->K1, p->keep, p->group, NB, v, (uint16_t *)(v + kept))) return 2;
  q.values = v, q.offsets = v + kept;
  return nm_linear(&q);
}

/* dx = dy W of a masked w (N, K): dy is p->x, N is p->K1, and K p->out.N */
int nm_linear_transposed(const linear_t *p, const float *w) {
  long N = p->K1, K = p->out.N, room = K * ROOM(N) + 8, counts = K * ((N + KB - 1) / KB);
  float *v = scratch(WEIGHTS, room + (room + 1) / 2 + (counts + 3) / 4);
  linear_t q = *p;
  if (!v) return 1;
  q.values = v, q.offsets = v + room, q.counts = (uint8_t *)(v + room + (room + 1) / 2);
  prepack_transposed(w, N, K, v, (uint16_t *)(v + room), (uint8_t *)q.counts);
  return nm_linear(&q);
}

int nm_lanes(void) { return LANES; }
