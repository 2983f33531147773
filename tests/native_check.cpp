// Compares the kernel with attention written out in double, over many combinations of options. Each tensor is in memory
// of exactly its size, so that a sanitizer finds every access outside it. tests/native_check.sh builds this file: with
// sanitizers, for other processors, and with other compilers.

#include "../local_attention/backends/native.cpp"

#include <cstdio>
#include <limits>
#include <random>

namespace {

constexpr int64_t ORIGIN[] = {3, 11};  // the group and the position from which dropout counts

struct Case {
  int64_t batch, heads, share, n_q, n_k, d, bucket, backward, forward, causal, prefix, offset, beside;
  bool mask, documents, bias, sinks, emb, hide_self;
  int64_t bias_heads, period;
  double softcap, rate;
  int64_t groups() const { return batch * heads; }
  int64_t kv_groups() const { return groups() / share; }
};

struct Tensors {
  std::vector<float> q, k, v, bias, sinks, emb, dout, dlse;
  std::vector<char> mask;
  std::vector<int32_t> documents;
  int32_t seed;
};

bool kept(const Tensors &x, const Case &c, int64_t g, int64_t query, int64_t key) {
  auto step = [](uint32_t y) { return y * (2 * y + 1); };
  auto scrambled = [&](uint32_t y) {
    y = step(y);
    return step(y ^ (uint32_t)((int32_t)y >> 16));
  };
  const uint32_t row = scrambled(row_hash(ORIGIN[0] + g, ORIGIN[1] + query) ^ (uint32_t)x.seed);
  return (int32_t)scrambled(row ^ column_hash(ORIGIN[1] + key)) >= (int32_t)((int64_t)(c.rate * 4294967296.) - 2147483648LL);
}

// out, lse, dq, dk, dv, dbias, dsinks, demb
std::vector<std::vector<double>> wanted(const Case &c, const Tensors &x, double scale) {
  const int64_t columns = c.backward + c.bucket + c.forward;
  std::vector<std::vector<double>> to;
  for (size_t size : {x.q.size(), x.dlse.size(), x.q.size(), x.k.size(), x.k.size(), x.bias.size(), x.sinks.size(),
                      x.emb.size()})
    to.emplace_back(size);
  for (int64_t g = 0; g < c.groups(); ++g)
    for (int64_t row = 0; row < c.n_q; ++row) {
      const int64_t i = row + c.offset, kg = g / c.share, batch = g / c.heads;
      const int64_t begun = c.documents ? x.documents[2 * (batch * c.n_k + i)] : 0;
      const int64_t end = c.documents ? x.documents[2 * (batch * c.n_k + i) + 1] + 1 : c.n_k;
      const int64_t p = i - begun, start = p / c.bucket * c.bucket;  // the position in its document
      int64_t last = start + c.bucket - 1 + c.forward;
      if (c.causal) last = std::min(last, p);
      const float *q = &x.q[(g * c.n_q + row) * c.d], *dout = &x.dout[(g * c.n_q + row) * c.d];
      const double dlse = x.dlse[g * c.n_q + row];
      double *out = &to[0][(g * c.n_q + row) * c.d], *dq = &to[2][(g * c.n_q + row) * c.d];
      const size_t column = (g % c.bias_heads * c.period + p % c.period) * columns - (p - p % c.period) + c.backward;
      std::vector<int64_t> keys;
      std::vector<double> scores, slopes, weights;
      for (int64_t j = begun; j < end; ++j) {
        const int64_t at = j - begun;
        if (!(at >= start - c.backward && at <= last) && !(at < c.prefix && (!c.causal || at <= p))) continue;
        if (c.mask && !x.mask[batch * c.n_k + j]) continue;
        double s = 0;
        for (int64_t e = 0; e < c.d; ++e) s += scale * q[e] * x.k[(kg * c.n_k + j) * c.d + e];
        const double capped = std::tanh(s / c.softcap);
        if (c.softcap > 0) s = c.softcap * capped;
        if (c.bias) s += x.bias[column + at];
        for (int64_t e = 0; c.emb && e < c.d; ++e) s += q[e] * x.emb[(j - i + c.backward) * c.d + e];
        if (c.hide_self && i == j) s = SELF_SCORE;
        keys.push_back(j), scores.push_back(s), slopes.push_back(c.softcap > 0 ? 1 - capped * capped : 1);
      }
      const double sink = c.sinks ? x.sinks[g % c.heads] : -INFINITY;
      const double top = keys.empty() ? sink : std::max(sink, *std::max_element(scores.begin(), scores.end()));
      double sum = top == -INFINITY ? 0 : std::exp(sink - top), dot = 0;
      const double sink_weight = sum;
      for (double s : scores) weights.push_back(std::exp(s - top)), sum += weights.back();
      to[1][g * c.n_q + row] = sum == 0 ? -INFINITY : top + std::log(sum);
      if (sum == 0) continue;
      for (double &w : weights) w /= sum;
      std::vector<double> dweights(keys.size()), factor(keys.size(), 1);
      for (size_t at = 0; at < keys.size(); ++at) {
        const int64_t j = keys[at];
        if (c.rate > 0) factor[at] = kept(x, c, g, i, j) ? 1 / (1 - c.rate) : 0;
        for (int64_t e = 0; e < c.d; ++e) {
          const int64_t place = (kg * c.n_k + j) * c.d + e;
          out[e] += factor[at] * weights[at] * x.v[place];
          to[4][place] += factor[at] * weights[at] * dout[e];
          dweights[at] += factor[at] * dout[e] * x.v[place];
        }
        dot += weights[at] * dweights[at];
      }
      if (c.sinks) to[6][g % c.heads] += sink_weight / sum * (dlse - dot);
      for (size_t at = 0; at < keys.size(); ++at) {
        const int64_t j = keys[at];
        double ds = c.hide_self && i == j ? 0 : weights[at] * (dweights[at] - dot + dlse);
        if (c.bias) to[5][column + j - begun] += ds;
        for (int64_t e = 0; e < c.d; ++e) {
          if (c.emb) dq[e] += ds * x.emb[(j - i + c.backward) * c.d + e];
          if (c.emb) to[7][(j - i + c.backward) * c.d + e] += ds * q[e];
        }
        ds *= slopes[at];
        for (int64_t e = 0; e < c.d; ++e) {
          dq[e] += scale * ds * x.k[(kg * c.n_k + j) * c.d + e];
          to[3][(kg * c.n_k + j) * c.d + e] += scale * ds * q[e];
        }
      }
    }
  return to;
}

// Draws documents of many lengths for each row of a batch, some of them padding.
std::vector<int32_t> draw_documents(const Case &c, std::mt19937 &random) {
  std::vector<int32_t> bounds(2 * c.batch * c.n_k);
  const int64_t lengths[] = {1, 2, 5, 30, 64, 150, 400};
  for (int64_t row = 0; row < c.batch; ++row)
    for (int64_t first = 0, length; first < c.n_k; first += length) {
      length = std::min<int64_t>(1 + random() % lengths[random() % 7], c.n_k - first);
      const bool padding = random() % 5 == 0;
      for (int64_t j = first; j < first + length; ++j) {
        bounds[2 * (row * c.n_k + j)] = padding ? j : first;
        bounds[2 * (row * c.n_k + j) + 1] = padding ? j - 1 : first + length - 1;
      }
    }
  return bounds;
}

// Whether `document_bounds` agrees with a search from each position for both ends of its run of one id. There are runs
// of length 1, padding with several ids, an id that comes again after another, and ids of all bits.
template <typename Id>
bool bounds_agree(const char *type, int64_t batch, int64_t n, std::mt19937 &random) {
  std::vector<Id> ids(batch * n), bounds(2 * batch * n, -7);
  const Id highest = std::numeric_limits<Id>::max(), drawn[] = {0, 0, 0, 1, -1, -100, highest, -highest};
  for (int64_t at = 0; at < batch * n; ++at) ids[at] = at && random() % 4 ? ids[at - 1] : drawn[random() % 8];
  int64_t shape[] = {batch, n}, *shapes[] = {shape};
  void *params[] = {ids.data(), bounds.data()};
  if (document_bounds(2, params, 0, shapes, &type, 0, 0)) return false;
  for (int64_t row = 0; row < batch; ++row)
    for (int64_t j = 0; j < n; ++j) {
      const Id *id = &ids[row * n];
      int64_t first = j, last = j;
      while (first > 0 && id[first - 1] == id[j]) --first;
      while (last + 1 < n && id[last + 1] == id[j]) ++last;
      if (id[j] < 0) first = j, last = j - 1;
      if (bounds[2 * (row * n + j)] != first || bounds[2 * (row * n + j) + 1] != last) return false;
    }
  return true;
}

// Reorders (batch, heads, n, d) to (batch, n, heads, d), or back.
std::vector<float> tokens_first(const Case &c, const std::vector<float> &x, bool back) {
  std::vector<float> to(x.size());
  for (int64_t row = 0; row < c.groups() * c.n_q; ++row) {
    const int64_t group = row / c.n_q, query = row % c.n_q;
    const int64_t at = (group / c.heads * c.n_q + query) * c.heads + group % c.heads;
    std::copy_n(&x[(back ? at : row) * c.d], c.d, &to[(back ? row : at) * c.d]);
  }
  return to;
}

// Returns what `wanted` returns, computed by the kernel; nothing if the kernel fails.
std::vector<std::vector<float>> given(const Case &c, Tensors &x, double scale, int64_t level, int64_t threads) {
  const int64_t columns = c.backward + c.bucket + c.forward;
  std::vector<int64_t> numbers{c.groups(), c.kv_groups(), c.n_q, c.n_k, c.d, c.bucket, c.backward, c.forward, c.causal,
                               c.prefix, c.offset, c.mask ? c.batch : 0, c.documents ? c.batch : 0,
                               c.bias ? c.bias_heads : 1, c.bias ? c.period : 1, c.bias ? columns : 0, c.backward,
                               c.emb ? columns : 0, c.sinks ? c.heads : 0, c.hide_self, threads, level, ORIGIN[0],
                               ORIGIN[1], c.beside};
  for (double real : {scale, c.softcap, c.rate}) {
    numbers.push_back(0);
    std::memcpy(&numbers.back(), &real, sizeof(real));
  }
  std::vector<float> statistics(2 * x.dlse.size());
  std::vector<std::vector<float>> to;
  for (size_t size : {x.q.size(), x.dlse.size(), x.q.size(), x.k.size(), x.k.size(), x.bias.size(), x.sinks.size(),
                      x.emb.size()})
    to.emplace_back(size, NAN);
  void *params[20] = {x.q.data(), x.k.data(), x.v.data(), x.mask.data(), x.documents.data(), x.bias.data(),
                      x.sinks.data(), x.emb.data(), &x.seed, numbers.data(), to[0].data(), statistics.data(),
                      to[1].data()};
  if (attention_forward(13, params, 0, 0, 0, 0, 0)) return {};
  std::vector<float> dout = c.beside > 1 ? tokens_first(c, x.dout, false) : x.dout;
  params[12] = dout.data(), params[13] = x.dlse.data();
  for (int i = 2; i < 8; ++i) params[12 + i] = to[i].data();
  if (attention_backward(20, params, 0, 0, 0, 0, 0)) return {};
  if (c.beside > 1) to[0] = tokens_first(c, to[0], true);
  return to;
}

// Returns the largest error, divided by the largest number of its tensor, or by a lower bound if that is larger.
double run(const Case &c, int64_t level, int64_t threads, std::mt19937 &random) {
  std::normal_distribution<float> normal;
  auto draw = [&](int64_t size) {
    std::vector<float> x(size);
    for (float &y : x) y = normal(random);
    return x;
  };
  const int64_t columns = c.backward + c.bucket + c.forward, queries = c.groups() * c.n_q;
  const int64_t keys = c.kv_groups() * c.n_k;
  const double scale = (c.softcap > 0 ? 3 : 1) / std::sqrt((double)c.d);
  Tensors x{draw(queries * c.d), draw(keys * c.d), draw(keys * c.d),
            draw(c.bias ? c.bias_heads * c.period * columns : 1), draw(c.sinks ? c.heads : 1),
            draw(c.emb ? columns * c.d : 1), draw(queries * c.d), draw(queries),
            std::vector<char>(c.mask ? c.batch * c.n_k : 1),
            c.documents ? draw_documents(c, random) : std::vector<int32_t>(1), (int32_t)random()};
  for (char &real : x.mask) real = random() % 3 > 0;
  for (std::vector<float> *of : {&x.emb, &x.dout})
    for (float &y : *of) y *= (float)(1 / std::sqrt((double)c.d));  // so that products with them are about 1
  if (c.sinks && random() % 3 == 0) x.sinks[0] = random() % 2 ? -INFINITY : 30;
  const bool poison = random() % 3 == 0;
  for (int64_t key = 0; poison && key < keys; ++key) {
    const int64_t at = key / (keys / c.batch) * c.n_k + key % c.n_k;
    const bool unseen = (c.mask && !x.mask[at]) || (c.documents && x.documents[2 * at] > x.documents[2 * at + 1]);
    for (std::vector<float> *of : {&x.k, &x.v})
      if (unseen) std::fill_n(of->begin() + key * c.d, c.d, NAN);
  }
  const auto truth = wanted(c, x, scale);
  const auto got = given(c, x, scale, level, threads), again = given(c, x, scale, level, threads + 1);
  if (got.empty() || again.empty()) return INFINITY;
  double worst = 0;
  for (int i = 0; i < 8; ++i) {
    if ((i == 5 && !c.bias) || (i == 6 && !c.sinks) || (i == 7 && !c.emb)) continue;
    const bool sliced = i == 5 || i == 7;  // summed in slices, whose number depends on threads
    if (!sliced && std::memcmp(got[i].data(), again[i].data(), got[i].size() * sizeof(float))) return INFINITY;
    // The bound is 1, and larger for gradients to which every query adds: if each sees one key alone, those are 0, and
    // what is found is the sum of as many rounding errors as there are queries.
    double largest = i < 5 ? 1 : std::sqrt(c.groups() * c.n_q), error = 0;
    for (size_t at = 0; at < truth[i].size(); ++at) {
      if (truth[i][at] == got[i][at]) continue;  // equal infinities, too
      largest = std::max(largest, std::fabs(truth[i][at]));
      const double difference = std::fabs(got[i][at] - truth[i][at]);
      error = std::isnan(difference) ? INFINITY : std::max(error, difference);
    }
    worst = std::max(worst, error / largest);
  }
  return worst;
}

// Compares what works row by row with doubles: LayerNorm, GEGLU, rotation, a token written into the ring buffers, and
// the split of heads. Returns the worst error.
double run_rows(int64_t count, int64_t d, int64_t level, std::mt19937 &random) {
  std::normal_distribution<float> normal;
  auto draw = [&](int64_t size) {
    std::vector<float> x(size);
    for (float &value : x) value = normal(random);
    return x;
  };
  const double epsilon = 1e-5, frequency = 0.3;
  int64_t bits[2];
  std::memcpy(bits, &epsilon, 8), std::memcpy(bits + 1, &frequency, 8);
  double worst = 0;
  auto compare = [&](float got, double truth, double by = 1) {  // `by`: the factor of numbers of about 1
    const double error = std::fabs(got - truth) / std::max(std::max(1., by), std::fabs(truth));
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  };
  std::vector<int64_t> numbers{3, level, bits[0]};
  int axes[] = {2, 1};

  std::vector<float> x = draw(count * d), gamma = draw(d), beta = draw(d), dy = draw(count * d), y(count * d),
                     dx(count * d), dgamma(d), dbeta(d);
  int64_t rows[] = {count, d}, *shapes[] = {rows};
  void *norm[] = {x.data(), gamma.data(), beta.data(), numbers.data(), y.data()};
  void *norm_back[] = {x.data(), gamma.data(), numbers.data(), dy.data(), dx.data(), dgamma.data(), dbeta.data()};
  if (layer_norm_forward(5, norm, axes, shapes, 0, 0, 0) || layer_norm_backward(7, norm_back, axes, shapes, 0, 0, 0))
    return INFINITY;
  std::vector<double> dgamma_truth(d), dbeta_truth(d);
  double largest = 0;
  for (int64_t row = 0; row < count; ++row) {
    const float *at = x.data() + row * d, *got = dy.data() + row * d;
    double mean = 0, square = 0, total = 0, along = 0;
    for (int64_t c = 0; c < d; ++c) mean += at[c] / (double)d;
    for (int64_t c = 0; c < d; ++c) square += (at[c] - mean) * (at[c] - mean) / d;
    const double inverse = 1 / std::sqrt(square + epsilon);
    largest = std::max(largest, inverse);
    for (int64_t c = 0; c < d; ++c) {
      total += got[c] * gamma[c] / d, along += got[c] * gamma[c] * (at[c] - mean) * inverse / d;
      dgamma_truth[c] += got[c] * (at[c] - mean) * inverse, dbeta_truth[c] += got[c];
    }
    for (int64_t c = 0; c < d && d > 1; ++c) {  // for d = 1, a norm divides by almost 0
      const double normed = (at[c] - mean) * inverse;
      compare(y[row * d + c], normed * gamma[c] + beta[c], inverse);
      compare(dx[row * d + c], inverse * (got[c] * gamma[c] - total - normed * along), inverse);
    }
  }
  for (int64_t c = 0; c < d && d > 1; ++c) compare(dgamma[c], dgamma_truth[c], largest), compare(dbeta[c], dbeta_truth[c]);

  std::vector<float> wide = draw(count * 2 * d), dwide(count * 2 * d);
  int64_t wide_rows[] = {count, 2 * d}, *wide_shapes[] = {wide_rows};
  void *gate[] = {wide.data(), numbers.data(), y.data()}, *gate_back[] = {wide.data(), numbers.data(), dy.data(), dwide.data()};
  if (geglu_forward(3, gate, axes, wide_shapes, 0, 0, 0) || geglu_backward(4, gate_back, axes, wide_shapes, 0, 0, 0))
    return INFINITY;
  for (int64_t row = 0; row < count; ++row)
    for (int64_t c = 0; c < d; ++c) {
      const double a = wide[row * 2 * d + c], g = wide[row * 2 * d + d + c], below = std::erfc(-g / std::sqrt(2.)) / 2;
      compare(y[row * d + c], a * g * below);
      compare(dwide[row * 2 * d + c], dy[row * d + c] * g * below);
      compare(dwide[row * 2 * d + d + c],
              dy[row * d + c] * a * (below + g * std::exp(-g * g / 2) / std::sqrt(2 * std::acos(-1.))));
    }

  std::vector<int64_t> turns{3, level, 0};
  for (int64_t c = 0; c < d; ++c) turns.push_back(bits[1]);
  int32_t position = 5;
  void *turn[] = {wide.data(), &position, turns.data(), dwide.data()};
  if (rotary(4, turn, axes, wide_shapes, 0, 0, 0)) return INFINITY;
  for (int64_t row = 0; row < count; ++row)
    for (int64_t c = 0; c < d; ++c) {
      const double a = wide[row * 2 * d + c], b = wide[row * 2 * d + d + c], angle = (position + row) * frequency;
      compare(dwide[row * 2 * d + c], a * std::cos(angle) - b * std::sin(angle));
      compare(dwide[row * 2 * d + d + c], b * std::cos(angle) + a * std::sin(angle));
    }

  const int64_t prefix = 2, kept = 3, places = prefix + kept, batch = 2;
  const int64_t more = 2 * count;  // query heads: two for each of `count` key heads
  std::vector<float> qkv = draw(batch * (more + 2 * count) * 2 * d), keys(batch * count * places * 2 * d), values = keys,
                     q(batch * more * 2 * d);
  int32_t in_rows[] = {1, position};  // the first row is still in its prefix
  turns[2] = prefix;
  int64_t qkv_shape[] = {batch, 1, (more + 2 * count) * 2 * d}, ring_shape[] = {batch * count, places, 2 * d}, one[] = {1},
          rows_shape[] = {batch}, turns_shape[] = {(int64_t)turns.size()},
          *ring_shapes[] = {qkv_shape, ring_shape, ring_shape, one, rows_shape, turns_shape};
  void *enter[] = {qkv.data(), keys.data(), values.data(), &position, in_rows, turns.data(), q.data()};
  if (enter_rings(7, enter, 0, ring_shapes, 0, 0, 0)) return INFINITY;
  const double cosine = std::cos(position * frequency), sine = std::sin(position * frequency);
  for (int64_t group = 0; group < batch * more; ++group)
    for (int64_t c = 0; c < d; ++c) {
      const float *from = qkv.data() + (group / more * (more + 2 * count) + group % more) * 2 * d;
      compare(q[group * 2 * d + c], from[c] * cosine - from[d + c] * sine);
    }
  for (int64_t group = 0; group < batch * count; ++group)
    for (int64_t c = 0; c < d; ++c) {
      const float *from = qkv.data() + (group / count * (more + 2 * count) + more + group % count) * 2 * d;
      for (int64_t place = 0; place < places; ++place) {
        const bool there = place == prefix + position % kept || place == in_rows[group / count];
        const int64_t at = (group * places + place) * 2 * d + c;
        compare(keys[at + d], there ? from[d + c] * cosine + from[c] * sine : 0);
        compare(values[at], there ? from[count * 2 * d + c] : 0);
      }
    }

  // Splits `count` tokens of two query heads and one key head, and joins them again; checks the rotation of each head.
  const int64_t heads = 2, all = heads + 2, n = count;
  const std::vector<float> tokens = draw(batch * n * all * 2 * d);
  std::vector<float> parts[3]{std::vector<float>(batch * heads * n * 2 * d), std::vector<float>(batch * n * 2 * d),
                              std::vector<float>(batch * n * 2 * d)}, joined(tokens.size(), NAN);
  int64_t tokens_shape[] = {batch, n, all * 2 * d}, sizes_shape[] = {heads, 1}, q_shape[] = {batch, heads, n, 2 * d},
          k_shape[] = {batch, 1, n, 2 * d}, *split_shapes[] = {tokens_shape, sizes_shape, turns_shape},
          *join_shapes[] = {q_shape, k_shape, k_shape, turns_shape};
  void *split[] = {(void *)tokens.data(), nullptr, turns.data(), parts[0].data(), parts[1].data(), parts[2].data()};
  void *join[] = {parts[0].data(), parts[1].data(), parts[2].data(), turns.data(), joined.data()};
  if (split_heads(6, split, 0, split_shapes, 0, 0, 0)) return INFINITY;
  if (join_heads(5, join, 0, join_shapes, 0, 0, 0)) return INFINITY;
  for (size_t at = 0; at < tokens.size(); ++at) compare(joined[at], tokens[at]);
  for (int64_t at = 0; at < batch * n * all * d; ++at) {
    const int64_t c = at % d, head = at / d % all, token = at / d / all % n, entry = at / d / all / n;
    const float *from = &tokens[(at - c) * 2];
    const int64_t part = head < heads ? 0 : 1 + head - heads, of = part ? 0 : head;
    const float *to = &parts[part][((entry * (part ? 1 : heads) + of) * n + token) * 2 * d];
    const double angle = (token + (part ? 0 : prefix)) * frequency;
    compare(to[c], part == 2 ? from[c] : from[c] * std::cos(angle) - from[d + c] * std::sin(angle));
  }
  return worst;
}

}  // namespace

int main(int count, char **arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 400;
  std::mt19937 random(7);
  for (int64_t batch : {1, 3})
    for (int64_t n : {1, 2, 17, 64, 301})
      if (!bounds_agree<int32_t>("int32", batch, n, random) || !bounds_agree<int64_t>("int64", batch, n, random)) {
        std::printf("bounds of documents: wrong for %d rows of %d\n", (int)batch, (int)n);
        return 1;
      }
  auto pick = [&](std::initializer_list<int64_t> choices) { return choices.begin()[random() % choices.size()]; };
  for (int64_t level = 0; level <= attention_level(); ++level) {
    double worst = 0;
    for (int number = 0; number < cases; ++number) {
      Case c{};
      c.batch = pick({1, 2}), c.heads = pick({1, 3, 4, 6}), c.share = pick({1, 1, 1, 2, 3, 4, 6});
      if (c.heads % c.share) c.share = c.heads;
      c.n_q = pick({1, 2, 15, 16, 17, 63, 64, 65, 100, 131, 300, 600, 700}), c.d = pick({1, 3, 8, 16, 20, 64, 257});
      c.bucket = pick({1, 1, 7, 16, 40, 64}), c.backward = pick({0, 1, 2, 5}) * c.bucket + (c.bucket == 1) * pick({0, 3, 90});
      c.causal = pick({0, 1});
      c.forward = c.causal ? 0 : c.bucket == 1 ? pick({-1, 0, 5, 80}) : pick({0, 1}) * c.bucket;
      c.beside = random() % 3 ? 1 : c.heads;
      c.offset = pick({0, 0, 5, 64, 200}), c.n_k = c.n_q + c.offset;
      if (c.n_q > 200) c.d = std::min<int64_t>(c.d, 20);  // the plain computation is slow
      c.mask = random() % 3 == 0, c.bias = random() % 3 == 0, c.hide_self = random() % 4 == 0;
      const bool columns = c.backward + c.bucket + c.forward > 0;
      c.bias = c.bias && columns, c.emb = c.bucket == 1 && columns && random() % 3 == 0;
      c.bias_heads = random() % 3 ? c.heads : 1, c.period = c.bucket;
      c.documents = random() % 2, c.sinks = random() % 3 == 0, c.softcap = pick({0, 0, 2, 30});
      c.prefix = c.bias || c.emb ? 0 : pick({0, 1, 4, 70, 400, 600});
      c.rate = random() % 4 ? 0 : 0.3;
      const double error = run(c, level, 1 + number % 3, random);
      worst = std::max(worst, error);
      if (!(error < 1e-5)) {
        std::printf("case %d at level %d: off by %g of the largest number\n", number, (int)level, error);
        std::printf("batch %d heads %d/%d n %d %d d %d span %d %d %d %d prefix %d offset %d mask %d documents %d "
                    "bias %d sinks %d emb %d hide_self %d softcap %g rate %g\n",
                    (int)c.batch, (int)c.heads, (int)c.share, (int)c.n_q, (int)c.n_k, (int)c.d, (int)c.bucket,
                    (int)c.backward, (int)c.forward, (int)c.causal, (int)c.prefix, (int)c.offset, c.mask, c.documents,
                    c.bias ? (int)c.bias_heads : 0, c.sinks, c.emb, c.hide_self, c.softcap, c.rate);
        return 1;
      }
    }
    for (int64_t d : {1, 3, 8, 16, 21, 257})
      for (int64_t rows : {1, 2, 40}) worst = std::max(worst, run_rows(rows, d, level, random));
    if (!(worst < 1e-5)) {
      std::printf("layers at level %d: off by %g\n", (int)level, worst);
      return 1;
    }
    std::printf("level %d: %d cases, the worst off by %.1e of the largest number\n", (int)level, cases, worst);
  }
  return 0;
}
