// Vectors of one width, functions of their numbers, and matrix products with them: a part of kernel.h.

constexpr int WIDTH = VECTOR_BYTES / 4;
constexpr int QUERIES = BLOCK_QUERIES;
constexpr int64_t CACHE_LINE = 64;
constexpr float LOG2_E = 1.44269504f, LOG_2 = 0.69314718f;
constexpr int COLUMNS = REGISTERS / 8;  // of 4 rows of sums: these fill half of the registers, and the factors the rest

typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));

template <typename T, typename Element>
INLINE T load(const Element *from) {
  T x;
  __builtin_memcpy(&x, from, sizeof(T));
  return x;
}

template <typename T, typename Element>
INLINE void store(Element *to, T x) {
  __builtin_memcpy(to, &x, sizeof(T));
}

INLINE Vec all(float x) { return Vec{} + x; }

INLINE Vec max(Vec a, Vec b) {
#if VECTOR_BYTES == 64
  return _mm512_maskz_max_ps(-1, b, a);  // compilers turn the line below into a comparison and a masked move
#else
  return a < b ? b : a;
#endif
}

// 2^x for x < 127, with a relative error up to 2e-7. Below the smallest normal number it is 0. NaN stays NaN. It is a
// power of a fraction, by a minimax polynomial that is exact at 0, times one of an integer.
INLINE Vec power_of_2(Vec x) {
#if VECTOR_BYTES == 64
  const Vec r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // 0 ... 1
  Vec y = r * 0.001867140294f + 0.009017007425f;
  y = y * r + 0.05579993129f;
  y = y * r + 0.2401644439f;
  y = y * r + 0.6931512952f;
  y = y * r + 1.f;
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, all(-126.f), _CMP_NLT_UQ), y, x);
#else
  constexpr float SHIFT = 12582912.f + 127;  // adding 1.5 * 2^23 rounds to an integer, here an exponent's bits
  const Vec clamped = max(x, all(-127.f));   // the exponent of 0
  const Vec shifted = clamped + SHIFT;
  const Vec r = clamped - (shifted - SHIFT);  // -1/2 ... 1/2
  Vec y = r * 0.001326472731f + 0.009671512991f;
  y = y * r + 0.05550733581f;
  y = y * r + 0.2402224243f;
  y = y * r + 0.6931470037f;
  y = y * r + 1.f;
  return y * (Vec)((Bits)shifted << 23);
#endif
}

// tanh x, with a relative error up to 5e-7. It is an odd quotient of polynomials. Its coefficients were fitted for the
// smallest relative error (2e-8) on -9.02 ... 9.02; beyond that, tanh x is 1 or -1 in float32. NaN stays NaN.
INLINE Vec tanh(Vec x) {
  x = x > 9.02f ? all(9.02f) : max(x, all(-9.02f));
  const Vec y = x * x;
  const Vec above = (((1.33192639e-8f * y + 2.05836312e-5f) * y + 3.49404410e-3f) * y + 0.133797261f) * y + 1.f;
  const Vec below = (((7.76210149e-7f * y + 3.28310815e-4f) * y + 2.58711099e-2f) * y + 0.467130413f) * y + 1.f;
  return x * above / below;
}

// log x of a positive normal number, with an error up to 1.2e-7, or to this share of a result above 1. NaN stays NaN.
// What is left near 1 without a power of 2 has the logarithm 2 artanh((x - 1) / (x + 1)), here by its series.
INLINE Vec log(Vec x) {
  constexpr uint32_t SQRT_HALF = 0x3F3504F3;  // its bits
  const Bits above = (Bits)x - SQRT_HALF;
  const Vec exponent = __builtin_convertvector((Ints)above >> 23, Vec), near = (Vec)((above & 0x7FFFFF) + SQRT_HALF);
  const Vec s = (near - 1.f) / (near + 1.f), y = s * s;
  return exponent * LOG_2 + s * ((((y * (2 / 9.f) + 2 / 7.f) * y + 2 / 5.f) * y + 2 / 3.f) * y + 2.f) + x * 0.f;
}

// Loads a vector at `from`, where `count` numbers are left in the row. Lanes beyond them get `rest`.
INLINE Vec take(const float *from, int64_t count, float rest = 0) {
  if (count >= WIDTH) return load<Vec>(from);
  float edge[WIDTH];
  std::fill(edge, edge + WIDTH, rest);
  std::copy_n(from, count, edge);
  return load<Vec>(edge);
}

INLINE void put(float *to, int64_t count, Vec x) {
  if (count >= WIDTH) return store(to, x);
  float edge[WIDTH];
  store(edge, x);
  std::copy_n(edge, count, to);
}

INLINE float sum_of(Vec x) {
  float total = 0;
  for (int lane = 0; lane < WIDTH; ++lane) total += x[lane];
  return total;
}

// Acts on vectors v ... end - 1, as many at once as the registers hold: act(how many, as a constant, and the first).
template <int COUNT = COLUMNS, typename Act>
INLINE void across(int v, int end, Act &&act) {
  for (; v + COUNT <= end; v += COUNT) act(std::integral_constant<int, COUNT>{}, v);
  if constexpr (COUNT > 1)
    if (v < end) across<COUNT - 1>(v, end, act);
}

// Rows that are used soon and may be in no cache yet. Some are fetched at each part of a product: the processor would
// have to wait for all of them at once.
struct Ahead {
  struct Rows {
    const char *next;
    int64_t count, stride, width;  // in bytes
  };
  Rows rows[8];
  int left = 0;
  int64_t all = 0, each = 0;  // rows in all, and at each part

  void add(const char *first, int64_t count, int64_t stride, int64_t width) {
    if (count > 0 && left < (int)std::size(rows)) rows[left++] = {first, count, stride, width}, all += count;
  }

  void begin(int64_t parts) { each = divide_up(all, std::max<int64_t>(parts, 1)), all = 0; }

  INLINE void fetch() {
    for (int64_t i = 0; left && i < each; ++i) {
      Rows &from = rows[left - 1];
      for (int64_t c = 0; c < from.width; c += CACHE_LINE) __builtin_prefetch(from.next + c, 0, 2);
      from.next += from.stride;
      if (--from.count == 0) --left;
    }
  }
};

// c[row] (+)= the sum over steps of a[row, step] * b[step]. b and c are vectors; a has strides of rows and of steps.
template <int ROWS, int COUNT>
INLINE void matmul_registers(int64_t steps, const float *a, int64_t a_row, int64_t a_step, const float *b,
                             int64_t b_step, float *c, int64_t c_row, bool add) {
  Vec sum[ROWS][COUNT]{};
  for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
    Vec x[COUNT];
    for (int v = 0; v < COUNT; ++v) x[v] = load<Vec>(b + v * WIDTH);
    for (int row = 0; row < ROWS; ++row)
      for (int v = 0; v < COUNT; ++v) sum[row][v] += a[row * a_row] * x[v];
  }
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < COUNT; ++v) {
      float *to = c + row * c_row + v * WIDTH;
      store(to, add ? load<Vec>(to) + sum[row][v] : sum[row][v]);  // loaded this late, it keeps no product waiting
    }
}

template <int ROWS, int COUNT>
INLINE void matmul_rows(int64_t rows, int64_t steps, const float *a, int64_t a_row, int64_t a_step, const float *b,
                        int64_t b_step, float *c, int64_t c_row, bool add, Ahead &ahead) {
  for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_row, c += ROWS * c_row) {
    ahead.fetch();
    matmul_registers<ROWS, COUNT>(steps, a, a_row, a_step, b, b_step, c, c_row, add);
  }
  if constexpr (ROWS > 1)
    if (rows) matmul_rows<ROWS / 2, COUNT>(rows, steps, a, a_row, a_step, b, b_step, c, c_row, add, ahead);
}

NEVER_INLINE void matmul(int64_t rows, int vectors, int64_t steps, const float *a, int64_t a_row, int64_t a_step,
                         const float *b, int64_t b_step, float *c, int64_t c_row, bool add, Ahead &ahead) {
  across(0, vectors, [&](auto count, int v) {
    matmul_rows<count == COLUMNS ? 4 : 8, count>(rows, steps, a, a_row, a_step, b + v * WIDTH, b_step, c + v * WIDTH,
                                                 c_row, add, ahead);
  });
}

// The same sums without the products whose weight is 0: 0 * NaN is NaN, and an unseen key must have no effect. If
// `transposed`, weights[j, lane] * rows[j] is added to into[., lane], else weights[j, lane] * rows[lane] to into[j].
NEVER_INLINE void matmul_of_seen(int64_t keys, int64_t lanes, int64_t width, const float *weights, const float *rows,
                                 int64_t rows_stride, float *into, int64_t into_stride, bool transposed) {
  for (int64_t to = 0; to < (transposed ? lanes : keys); ++to)
    for (int64_t c = 0; c < width; c += WIDTH) {
      Vec sum{};
      for (int64_t from = 0; from < (transposed ? keys : lanes); ++from) {
        const float weight = transposed ? weights[from * QUERIES + to] : weights[to * QUERIES + from];
        if (weight != 0) sum += weight * take(rows + from * rows_stride + c, width - c);
      }
      for (int64_t i = 0; i < std::min<int64_t>(WIDTH, width - c); ++i)
        into[transposed ? (c + i) * into_stride + to : to * into_stride + c + i] += sum[i];
    }
}

NEVER_INLINE bool finite(const float *rows, int64_t count) {
  Vec zeros[4]{};
  int64_t x = 0;
  for (; x + 4 * WIDTH <= count; x += 4 * WIDTH)
    for (int i = 0; i < 4; ++i) zeros[i] += load<Vec>(rows + x + i * WIDTH) * 0.f;
  zeros[0] += zeros[1] + (zeros[2] + zeros[3]);
  float zero = 0;
  for (int lane = 0; lane < WIDTH; ++lane) zero += zeros[0][lane];
  for (; x < count; ++x) zero += rows[x] * 0;
  return zero == 0;
}

INLINE bool any(Ints x) {
#if VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#else
  int32_t found = 0;
  for (int lane = 0; lane < WIDTH; ++lane) found |= x[lane];
  return found;
#endif
}

INLINE Bits scramble(Bits x) {
  x = x * (x + x + 1);
  x ^= (Bits)((Ints)x >> 16);
  return x * (x + x + 1);
}

// Transposes a square of WIDTH rows: each step swaps the off-diagonal squares of one side, then goes on with half of
// it.
template <int SIDE, int... LANES>
INLINE void turn(Vec *rows, std::integer_sequence<int, LANES...> lanes) {
  for (int row = 0; row < WIDTH; ++row) {
    if (row & SIDE) continue;
    const Vec a = rows[row], b = rows[row + SIDE];
    rows[row] = SHUFFLE(a, b, (LANES & SIDE ? WIDTH + LANES - SIDE : LANES)...);
    rows[row + SIDE] = SHUFFLE(a, b, (LANES & SIDE ? WIDTH + LANES : LANES + SIDE)...);
  }
  if constexpr (SIDE > 1) turn<SIDE / 2>(rows, lanes);
}

INLINE void turn(Vec *rows) { turn<WIDTH / 2>(rows, std::make_integer_sequence<int, WIDTH>{}); }

// One factor for all columns, or one for each; there are whole vectors of these.
INLINE Vec factors_at(float factor, int64_t) { return all(factor); }
INLINE Vec factors_at(const float *factors, int64_t column) { return load<Vec>(factors + column); }

// to[column, row] = factor * from[row, column]. Rows of `to` are written in whole vectors, so zeros may follow the last
// number, but never beyond `to_width` or the stride.
template <typename Factor>
NEVER_INLINE void transpose(int64_t rows, int64_t columns, const float *from, int64_t from_stride, float *to,
                            int64_t to_stride, Factor factor, int64_t to_width = INT64_MAX) {
  to_width = std::min(to_width, to_stride);
  float edge[WIDTH * WIDTH];
  for (int64_t top = 0; top < rows; top += WIDTH)
    for (int64_t left = 0; left < columns; left += WIDTH) {
      const int64_t height = std::min<int64_t>(WIDTH, rows - top), width = std::min<int64_t>(WIDTH, columns - left);
      const float *square = from + top * from_stride + left;
      int64_t stride = from_stride;
      if (height < WIDTH || width < WIDTH) {
        std::fill(edge, edge + WIDTH * WIDTH, 0.f);
        for (int64_t i = 0; i < height; ++i) std::copy_n(square + i * stride, width, edge + i * WIDTH);
        square = edge, stride = WIDTH;
      }
      Vec x[WIDTH];
      for (int i = 0; i < WIDTH; ++i) x[i] = load<Vec>(square + i * stride) * factors_at(factor, left);
      turn(x);
      float *turned = to + left * to_stride + top;
      const bool direct = width == WIDTH && top + WIDTH <= to_width;
      for (int i = 0; i < WIDTH; ++i) store(direct ? turned + i * to_stride : edge + i * WIDTH, x[i]);
      for (int64_t i = 0; !direct && i < width; ++i)
        std::copy_n(edge + i * WIDTH, std::min<int64_t>(WIDTH, to_width - top), turned + i * to_stride);
    }
}
