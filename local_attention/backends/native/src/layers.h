// LayerNorm, GEGLU, rotary embedding, and the split of heads, row by row, forward and backward, for one width of
// vectors: a part of kernel.h.

// The mean of a row and the inverse of its standard deviation.
INLINE void moments(const float *x, int64_t d, float epsilon, float &mean, float &inverse) {
  Vec total{}, squares{};
  for (int64_t c = 0; c < d; c += WIDTH) total += take(x + c, d - c);
  mean = sum_of(total) / d;
  for (int64_t c = 0; c < d; c += WIDTH) {
    const Vec from_mean = take(x + c, d - c, mean) - mean;
    squares += from_mean * from_mean;
  }
  inverse = 1 / std::sqrt(sum_of(squares) / d + epsilon);
}

void layer_norm(const float *x, const float *gamma, const float *beta, float epsilon, int64_t d, float *y) {
  float mean, inverse;
  moments(x, d, epsilon, mean, inverse);
  for (int64_t c = 0; c < d; c += WIDTH)
    put(y + c, d - c, (take(x + c, d - c) - mean) * inverse * take(gamma + c, d - c) + take(beta + c, d - c));
}

void layer_norm_backward(const float *x, const float *gamma, float epsilon, const float *dy, int64_t d, float *dx,
                         float *dgamma, float *dbeta) {
  float mean, inverse;
  moments(x, d, epsilon, mean, inverse);
  Vec total{}, along{};
  for (int64_t c = 0; c < d; c += WIDTH) {
    const Vec normed = (take(x + c, d - c, mean) - mean) * inverse, got = take(dy + c, d - c);
    const Vec wanted = got * take(gamma + c, d - c);
    total += wanted, along += wanted * normed;
    put(dgamma + c, d - c, take(dgamma + c, d - c) + got * normed);
    put(dbeta + c, d - c, take(dbeta + c, d - c) + got);
  }
  const float mean_wanted = sum_of(total) / d, mean_along = sum_of(along) / d;
  for (int64_t c = 0; c < d; c += WIDTH) {
    const Vec normed = (take(x + c, d - c, mean) - mean) * inverse;
    const Vec wanted = take(dy + c, d - c) * take(gamma + c, d - c);
    put(dx + c, d - c, inverse * (wanted - mean_wanted - normed * mean_along));
  }
}

// Returns the probability that a standard normal number is less than x, with a relative error up to 2e-7, and sets
// `bell` to exp(-x^2 / 2). The probability of less than -|x| is `bell` times a polynomial in t = 1 / (1 + |x| / 4),
// fitted to erfcx for the smallest relative error.
INLINE Vec normal(Vec x, Vec &bell) {
  bell = power_of_2(x * x * (-0.5f * LOG2_E));
  const Vec t = 1.f / (1.f + max(x, -x) * 0.25f);
  Vec y = t * 0.040767528f - 0.167089461f;
  for (float next : {0.201101933f, -0.073448421f, 0.133385811f, 0.115792884f, 0.163663066f, 0.186879832f, 0.199475738f,
                     0.199471083f})
    y = y * t + next;
  y *= t * bell * 0.5f;
  return x > 0.f ? 1.f - y : y;
}

// y = a * gelu(gate); x holds a and then gate.
void geglu(const float *x, int64_t d, float *y) {
  for (int64_t c = 0; c < d; c += WIDTH) {
    const Vec gate = take(x + d + c, d - c);
    Vec bell;
    put(y + c, d - c, take(x + c, d - c) * (gate * normal(gate, bell)));
  }
}

void geglu_backward(const float *x, const float *dy, int64_t d, float *dx) {
  for (int64_t c = 0; c < d; c += WIDTH) {
    const Vec gate = take(x + d + c, d - c), got = take(dy + c, d - c);
    Vec bell;
    const Vec below = normal(gate, bell);
    put(dx + c, d - c, got * (gate * below));
    put(dx + d + c, d - c, got * take(x + c, d - c) * (below + gate * bell * 0.3989422804f));
  }
}

// Rotates each pair of numbers, half a row apart, by an angle. Negative sines rotate a gradient back.
void rotate(const float *x, const float *cosines, const float *sines, int64_t half, float *y) {
  for (int64_t c = 0; c < half; c += WIDTH) {
    const Vec a = take(x + c, half - c), b = take(x + half + c, half - c);
    const Vec cosine = take(cosines + c, half - c), sine = take(sines + c, half - c);
    put(y + c, half - c, a * cosine - b * sine);
    put(y + half + c, half - c, b * cosine + a * sine);
  }
}

constexpr int TOKENS = 16;  // of one head, moved at once, so that memory is read and written in longer pieces

// Moves tokens from rows of all heads, `(batch, n, (heads + 2 kv_heads) d)`, to queries, keys and values, each
// `(batch, heads, n, d)`. Queries and keys are rotated, values are not. A gradient moves the other way and is rotated
// back.
template <bool BACK>
void move_heads(const Heads &h, int64_t from, int64_t to, float *rows, float *const *parts) {
  const int64_t half = h.frequencies.size(), width = (h.heads + 2 * h.kv_heads) * h.d;
  std::vector<float> cosines(2 * TOKENS * half), sines(2 * TOKENS * half);  // of queries, then of keys
  for (int64_t start = from; start < to; start += TOKENS) {
    const int64_t count = std::min<int64_t>(TOKENS, to - start);
    for (int64_t i = 0; i < 2 * count * half; ++i) {
      const int64_t key = i >= count * half, token = start + i / half % count;
      const double angle = (double)(token + (key ? 0 : h.first_query)) * h.frequencies[i % half];
      const int64_t same = i - count * half;
      const bool known = key && h.first_query == 0;
      cosines[i] = known ? cosines[same] : (float)std::cos(angle);
      sines[i] = known ? sines[same] : (float)(BACK ? -std::sin(angle) : std::sin(angle));
    }
    for (int64_t entry = 0; entry < h.batch; ++entry) {
      float *row = rows + (entry * h.n + start) * width;
      for (int part = 0; part < 3; ++part)
        for (int64_t head = 0, heads = part ? h.kv_heads : h.heads; head < heads; ++head, row += h.d) {
          float *x = parts[part] + ((entry * heads + head) * h.n + start) * h.d;
          for (int64_t token = 0; token < count; ++token) {
            float *beside = row + token * width, *own = x + token * h.d;
            const int64_t angles = ((part ? count : 0) + token) * half;
            if (part < 2 && half)
              rotate(BACK ? own : beside, &cosines[angles], &sines[angles], half, BACK ? beside : own);
            else
              std::copy_n(BACK ? own : beside, h.d, BACK ? beside : own);
          }
        }
    }
  }
}
