/* The CPU kernels against loops in double, on random problems, without Python: for sanitizers, and for processors that
 * are emulated. Every array has exactly its size. Usage: harness COUNT SEED; prints the worst errors; 1: too large. */
#include <stdio.h>
#include "../../../sparsedm/kernels/cpu/product.c"
#include "../../../sparsedm/kernels/cpu/attention.c"
#include "../../../sparsedm/kernels/cpu/mask.c"

static uint64_t state;
static uint32_t bits32(void) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}
static long between(long low, long high) { return low + bits32() % (high - low + 1); }
static float number(void) { return (bits32() / (float)(1u << 30) - 1.f) * 1.7f; }
static float *numbers(long n) {
  float *a = malloc(n * sizeof(float));
  for (long i = 0; i < n; i++) a[i] = number();
  return a;
}
static double activation(double x, int act) {
  if (act == GELU) return x * .5 * erfc(-x / sqrt(2));
  if (act == GELU_TANH) return x * .5 * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  return act == SILU ? x / (1 + exp(-x)) : x;
}
static void pattern(int *keep, int *group) { *group = 1 << between(1, 5), *keep = between(1, *group - 1); }

static double worst;
static void compare(const float *y, const double *exact, long n, const char *what) {
  double error = 0, size = 1e-3;
  for (long i = 0; i < n; i++) {
    error = fmax(error, fabs(y[i] - exact[i])), size = fmax(size, fabs(exact[i]));
    if (y[i] != y[i]) error = INFINITY;
  }
  worst = fmax(worst, error / size);
  if (!(error / size < 5e-6)) printf("%s: error %g of %g\n", what, error, size), exit(1);
}

/* nm_select against counting who comes before whom; then w is masked */
static uint8_t *select_and_check(float *w, long outer, int group, long inner, int keep) {
  long n = outer * group * inner;
  float *masked = malloc(n * sizeof(float));
  uint8_t *mask = malloc(n);
  if (nm_select(w, outer, group, inner, keep, masked, mask)) printf("no weight is NaN\n"), exit(1);
  for (long i = 0; i < n; i++) {
    long place = i / inner % group, first = i - place * inner, before = 0;
    for (int j = 0; j < group; j++) {
      float other = fabsf(w[first + j * inner]), own = fabsf(w[i]);
      before += other > own || (other == own && j < place);
    }
    if (mask[i] != (before < keep) || masked[i] != (mask[i] ? w[i] : 0)) printf("mask of %d:%d\n", keep, group), exit(1);
  }
  memcpy(w, masked, n * sizeof(float));
  free(masked);
  return mask;
}

static void check_linear(void) {
  int keep, group;
  pattern(&keep, &group);
  long M = between(1, 40), N = between(1, 90), K = group * between(1, 150 / group), K1 = between(0, 1) ? K : between(1, K), per = between(1, M);
  int few = M <= 16 && between(0, 1);
  long rounded = few ? (N + LANES - 1) / LANES * LANES : N, scales = (M + per - 1) / per;
  float *x = numbers(M * K1), *skip = numbers(M * (K - K1) + 1), *w = numbers(N * K), *y = numbers(M * N);
  float *bias = numbers(N), *scale = numbers(scales * N), *residual = numbers(M * N), *v = numbers(rounded * K * keep / group);
  void *o = malloc(rounded * K * keep / group * (few ? 1 : 2));
  uint8_t *mask = select_and_check(w, N * K / group, group, 1, keep);
  double *exact = malloc(M * N * sizeof(double));
  if (nm_prepack(few ? FEW_ROWS : LINEAR, w, mask, N, 1, K, keep, group, 0, v, o)) exit(1);
  linear_t p = {x, K1 < K ? skip : 0, v, o, 0, K1, K - K1, M, K1, K - K1, keep, group};
  p.out = (out_t){between(0, 1) ? bias : 0, between(0, 1) ? scale : 0, between(0, 1) ? residual : 0, y, N, N, per, N, between(0, 3)};
  for (long m = 0; m < M; m++)
    for (long n = 0; n < N; n++) {
      double s = p.out.bias ? bias[n] : 0;
      for (long k = 0; k < K; k++) s += (double)w[n * K + k] * (k < K1 ? x[m * K1 + k] : skip[m * (K - K1) + k - K1]);
      s = activation(s, p.out.act) * (p.out.scale ? scale[m / per * N + n] : 1);
      exact[m * N + n] = s + (p.out.residual ? residual[m * N + n] : 0);
    }
  if ((few ? nm_linear_few : nm_linear)(&p)) exit(1);
  compare(y, exact, M * N, few ? "few rows" : "linear");
  if (K1 == K) {
    linear_t g = {y, .ldx = N, .M = M, .K1 = N, .keep = keep, .group = group};
    float *dx = malloc(M * K * sizeof(float));
    double *dense = calloc(M * K, sizeof(double));
    for (long i = 0; i < M * N * K; i++) dense[i / K / N * K + i % K] += (double)y[i / K] * w[i % (N * K)];
    g.out = (out_t){.y = dx, .ldy = K, .per = 1, .N = K};
    if (nm_linear_transposed(&g, w)) exit(1);
    compare(dx, dense, M * K, "gradient");
    free(dx), free(dense);
  }
  void *all[] = {x, skip, w, y, bias, scale, residual, v, o, mask, exact};
  for (unsigned i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void check_conv(void) {
  int keep, group;
  pattern(&keep, &group);
  long B = between(1, 2), C = group * between(1, 1 + 40 / group), N = between(1, 40), H = between(1, 9), k = 1 + 2 * between(0, 2);
  long W = between(0, 1) ? LANES * between(1, 3) : between(1, 20), stride = between(1, 2), pad = between(0, k / 2);
  if (H + 2 * pad < k || W + 2 * pad < k) return;
  long OH = (H + 2 * pad - k) / stride + 1, OW = (W + 2 * pad - k) / stride + 1, taps = k * k, size = N * taps * C;
  int nhwc = between(0, 1), halo = k == 3 && stride == 1 && pad == 1 && nm_halo_channels(W, group) && between(0, 3);
  float *x = numbers(B * C * H * W), *w = numbers(size), *y = numbers(B * N * OH * OW), *bias = numbers(N);
  float *residual = numbers(B * N * OH * OW), *v = numbers(size * keep / group);
  uint16_t *o = malloc(size * keep / group * 2);
  uint8_t *mask = select_and_check(w, size / group, group, 1, keep);
  double *exact = malloc(B * N * OH * OW * sizeof(double));
  if (nm_prepack(halo ? HALO : CONV, w, mask, N, taps, C, keep, group, W, v, o)) exit(1);
  conv_t c = {x, v, o, B, C, H, W, OH, OW, k, k, stride, pad, pad, keep, group, nhwc};
  c.out = (out_t){between(0, 1) ? bias : 0, 0, between(0, 1) ? residual : 0, y, N, N, 1, N, between(0, 3)};
  for (long i = 0; i < B * N * OH * OW; i++) {
    long b = i / (N * OH * OW), n = i / (OH * OW) % N, oy = i / OW % OH, ox = i % OW;
    long to = nhwc ? ((b * OH + oy) * OW + ox) * N + n : i;
    double s = c.out.bias ? bias[n] : 0;
    for (long t = 0; t < taps; t++) {
      long iy = oy * stride + t / k - pad, ix = ox * stride + t % k - pad;
      if (iy < 0 || iy >= H || ix < 0 || ix >= W) continue;
      for (long ch = 0; ch < C; ch++)
        s += (double)w[(n * taps + t) * C + ch] * x[nhwc ? ((b * H + iy) * W + ix) * C + ch : ((b * C + ch) * H + iy) * W + ix];
    }
    exact[to] = activation(s, c.out.act) + (c.out.residual ? residual[to] : 0);
  }
  if ((halo ? nm_conv_halo : nm_conv)(&c)) exit(1);
  compare(y, exact, B * N * OH * OW, halo ? "halo" : "convolution");
  void *all[] = {x, w, y, bias, residual, v, o, mask, exact};
  for (unsigned i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void check_attention(void) {
  long B = between(1, 2), H = between(1, 3), L = between(1, 70), D = 16 * between(1, 3), row = 3 * H * D;
  float *qkv = numbers(B * L * row), *y = numbers(B * L * H * D);
  double *exact = calloc(B * L * H * D, sizeof(double)), *s = malloc(L * sizeof(double));
  attention_t p = {qkv, qkv + H * D, qkv + 2 * H * D, y, B, H, L, D, L * row, D, row};
  for (long i = 0; i < B * H * L; i++) {
    long b = i / (H * L), h = i / L % H, q = i % L;
    double top = -INFINITY, sum = 0;
    for (long j = 0; j < L; j++) {
      s[j] = 0;
      for (long d = 0; d < D; d++)
        s[j] += (double)p.q[(b * L + q) * row + h * D + d] * p.k[(b * L + j) * row + h * D + d] / sqrt(D);
      top = fmax(top, s[j]);
    }
    for (long j = 0; j < L; j++) sum += s[j] = exp(s[j] - top);
    for (long j = 0; j < L; j++)
      for (long d = 0; d < D; d++) exact[((b * L + q) * H + h) * D + d] += s[j] / sum * p.v[(b * L + j) * row + h * D + d];
  }
  if (nm_attention(&p)) exit(1);
  compare(y, exact, B * L * H * D, "attention");
  free(qkv), free(y), free(exact), free(s);
}

static void check_mask(void) {
  int keep, group;
  pattern(&keep, &group);
  long inner = between(0, 1) ? 1 : between(2, 20), outer = between(1, 50), n = outer * group * inner;
  float *w = numbers(n), *g = numbers(n), *out = numbers(n), *masked = malloc(n * sizeof(float));
  if (between(0, 1))
    for (long i = 0; i < n; i++) w[i] = between(-2, 2); /* many ties */
  memcpy(masked, w, n * sizeof(float));
  uint8_t *mask = select_and_check(masked, outer, group, inner, keep);
  nm_decay(g, w, mask, 2e-4f, n, out);
  for (long i = 0; i < n; i++) {
    volatile float pull = mask[i] ? 0 : 2e-4f * w[i];
    if (out[i] != g[i] + pull) printf("decay\n"), exit(1);
  }
  free(w), free(g), free(out), free(masked), free(mask);
}

int main(int count, char **arguments) {
  if (count != 3) return 2;
  state = strtoul(arguments[2], 0, 10);
  const char *names[] = {"linear", "convolution", "attention", "mask"};
  void (*checks[])(void) = {check_linear, check_conv, check_attention, check_mask};
  for (int kind = 0; kind < 4; kind++) {
    worst = 0;
    for (long i = 0; i < strtol(arguments[1], 0, 10); i++) checks[kind]();
    printf("%s: %s problems, %d lanes, worst error %.1e\n", names[kind], arguments[1], LANES, worst);
  }
  return 0;
}
