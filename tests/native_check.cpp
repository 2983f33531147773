// Compares the kernel with attention written out in double, over many combinations of options. Each tensor is in memory
// of exactly its size, so that a sanitizer finds every access outside it. tests/native_check.sh builds this file: with
// sanitizers, for other processors, and with other compilers.

#include "../local_attention/backends/native/src/native.cpp"

#include <cstdio>
#include <limits>
#include <numeric>
#include <random>

namespace {

// Calls an operator as MindSpore does, with tensors of these shapes.
struct Operands {
  std::vector<void *> data;
  Shapes shapes;
  std::vector<const char *> types;
  Type half = Type::FLOAT16;  // of numbers of two bytes

  template <typename T>
  Operands &add(const std::vector<T> &x, std::vector<int64_t> shape = {}) {
    data.push_back((void *)x.data()), shapes.push_back(shape.empty() ? std::vector<int64_t>{(int64_t)x.size()} : shape);
    types.push_back(std::is_same_v<T, float>  ? "float32"
                    : std::is_same_v<T, char> ? "bool"
                    : sizeof(T) == 2          ? TYPE_NAMES[(int)half]
                    : sizeof(T) == 4          ? "int32"
                                              : "int64");
    return *this;
  }

  template <typename Operator>
  int call(Operator &&act) {
    std::vector<int> axes;
    std::vector<int64_t *> sizes;
    for (auto &shape : shapes) axes.push_back(shape.size()), sizes.push_back(shape.data());
    return act(data.size(), data.data(), axes.data(), sizes.data(), types.data(), nullptr, nullptr);
  }
};

constexpr int64_t ORIGIN[] = {3, 11};  // the group and the position from which dropout counts

struct Case {
  int64_t batch, heads, share, n_q, n_k, d, d_v, bucket, backward, forward, causal, prefix, offset, beside;
  bool mask, documents, bias, sinks, emb, hide_self;
  int64_t bias_heads, period;
  double softcap, rate;
  bool huge;                       // whether scores are near the ends of float32
  bool bias_rows, sink_rows, own;  // whether each query has its row of the bias, its sink, its query of embeddings
  int64_t bias_batch, order;       // order: how many rows it has
  int64_t groups() const { return batch * heads; }
  int64_t columns() const { return bias || emb ? backward + bucket + forward : 0; }
  int64_t kv_groups() const { return groups() / share; }
  int64_t sink_count() const { return !sinks ? 1 : sink_rows ? groups() * n_q : heads; }
  int64_t bias_size() const { return bias ? bias_batch * bias_heads * (bias_rows ? n_q : period) * columns() : 1; }
};

struct Inputs {
  std::vector<float> q, k, v, bias, sinks, emb, emb_q, dout, dlse;
  std::vector<char> mask;
  std::vector<int32_t> documents, order;
  int32_t seed;
};

bool kept(const Inputs &x, const Case &c, int64_t g, int64_t query, int64_t key) {
  auto step = [](uint32_t y) { return y * (2 * y + 1); };
  auto scrambled = [&](uint32_t y) {
    y = step(y);
    return step(y ^ (uint32_t)((int32_t)y >> 16));
  };
  const uint32_t row = scrambled(row_hash(ORIGIN[0] + g, ORIGIN[1] + query) ^ (uint32_t)x.seed);
  return (int32_t)scrambled(row ^ column_hash(ORIGIN[1] + key)) >= (int32_t)((int64_t)(c.rate * 4294967296.) - 2147483648LL);
}

std::vector<size_t> sizes_of(const Inputs &x) {
  return {x.dout.size(), x.dlse.size(), x.q.size(),   x.k.size(),    x.v.size(),
          x.bias.size(), x.sinks.size(), x.emb.size(), x.emb_q.size()};
}

// out, lse, dq, dk, dv, dbias, dsinks, demb, demb_q
std::vector<std::vector<double>> wanted(const Case &c, const Inputs &x, double scale) {
  const int64_t columns = c.columns();
  std::vector<std::vector<double>> to;
  for (size_t size : sizes_of(x)) to.emplace_back(size);
  for (int64_t g = 0; g < c.groups(); ++g)
    for (int64_t row = 0; row < c.n_q; ++row) {
      const int64_t i = row + c.offset, kg = g / c.share, batch = g / c.heads;
      const int64_t begun = c.documents ? x.documents[2 * (batch * c.n_k + i)] : 0;
      const int64_t end = c.documents ? x.documents[2 * (batch * c.n_k + i) + 1] + 1 : c.n_k;
      const int64_t p = i - begun, start = p / c.bucket * c.bucket;  // the position in its document
      int64_t last = start + c.bucket - 1 + c.forward;
      if (c.causal) last = std::min(last, p);
      const float *q = &x.q[(g * c.n_q + row) * c.d], *dout = &x.dout[(g * c.n_q + row) * c.d_v];
      const float *emb_q = c.own ? &x.emb_q[(g * c.n_q + row) * c.d] : q;
      const int32_t *order = c.order ? &x.order[batch * c.order / c.batch * c.n_k] : nullptr;
      const double dlse = x.dlse[g * c.n_q + row];
      double *out = &to[0][(g * c.n_q + row) * c.d_v], *dq = &to[2][(g * c.n_q + row) * c.d];
      double *demb_q = c.own ? &to[8][(g * c.n_q + row) * c.d] : dq;
      const int64_t entry = g / (c.groups() / c.bias_batch) * c.bias_heads + g % c.bias_heads;
      const int64_t bias_row = c.bias_rows ? entry * c.n_q + row : entry * c.period + p % c.period;
      const size_t column = c.bias ? bias_row * columns - (p - p % c.period) + c.backward : 0;
      std::vector<int64_t> keys;
      std::vector<double> scores, slopes, weights;
      for (int64_t j = begun; j < end; ++j) {
        const int64_t at = j - begun;
        if (!(at >= start - c.backward && at <= last) && !(at < c.prefix && (!c.causal || at <= p))) continue;
        if (c.mask && !x.mask[batch * c.n_k + j]) continue;
        if (order && order[j] > order[i]) continue;
        if (c.bias && x.bias[column + at] < -1e29f) continue;
        double s = 0;
        for (int64_t e = 0; e < c.d; ++e) s += scale * q[e] * x.k[(kg * c.n_k + j) * c.d + e];
        const double capped = std::tanh(s / c.softcap);
        if (c.softcap > 0) s = c.softcap * capped;
        if (c.bias) s += x.bias[column + at];
        for (int64_t e = 0; c.emb && e < c.d; ++e) s += emb_q[e] * x.emb[(j - i + c.backward) * c.d + e];
        if (c.hide_self && i == j) s = SELF_SCORE;
        keys.push_back(j), scores.push_back(s), slopes.push_back(c.softcap > 0 ? 1 - capped * capped : 1);
      }
      const int64_t sink_at = c.sink_rows ? g * c.n_q + row : g % c.heads;
      const double sink = c.sinks ? x.sinks[sink_at] : -INFINITY;
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
        for (int64_t e = 0; e < c.d_v; ++e) {
          const int64_t place = (kg * c.n_k + j) * c.d_v + e;
          out[e] += factor[at] * weights[at] * x.v[place];
          to[4][place] += factor[at] * weights[at] * dout[e];
          dweights[at] += factor[at] * dout[e] * x.v[place];
        }
        dot += weights[at] * dweights[at];
      }
      if (c.sinks) to[6][sink_at] += sink_weight / sum * (dlse - dot);
      for (size_t at = 0; at < keys.size(); ++at) {
        const int64_t j = keys[at];
        double ds = c.hide_self && i == j ? 0 : weights[at] * (dweights[at] - dot + dlse);
        if (c.bias) to[5][column + j - begun] += ds;
        for (int64_t e = 0; e < c.d; ++e) {
          if (c.emb) demb_q[e] += ds * x.emb[(j - i + c.backward) * c.d + e];
          if (c.emb) to[7][(j - i + c.backward) * c.d + e] += ds * emb_q[e];
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

// Draws an order: each key's position, one number for a few keys next to each other, or a permutation.
std::vector<int32_t> draw_order(const Case &c, std::mt19937 &random) {
  std::vector<int32_t> order(c.order * c.n_k);
  for (int64_t row = 0; row < c.order; ++row) {
    int32_t *const of = &order[row * c.n_k];
    std::iota(of, of + c.n_k, -3);
    const int64_t kind = random() % 3;
    if (kind == 1) std::shuffle(of, of + c.n_k, random);
    for (int64_t j = 1; kind == 2 && j < c.n_k; ++j) of[j] = random() % 9 ? of[j - 1] : of[j];
  }
  return order;
}

// Reorders (batch, heads, n, d) to (batch, n, heads, d), or back.
std::vector<float> tokens_first(const Case &c, const std::vector<float> &x, bool back) {
  std::vector<float> to(x.size());
  for (int64_t row = 0; row < c.groups() * c.n_q; ++row) {
    const int64_t group = row / c.n_q, query = row % c.n_q;
    const int64_t at = (group / c.heads * c.n_q + query) * c.heads + group % c.heads;
    std::copy_n(&x[(back ? at : row) * c.d_v], c.d_v, &to[(back ? row : at) * c.d_v]);
  }
  return to;
}

std::vector<int64_t> numbers_of(const Case &c, double scale, int64_t level, int64_t threads) {
  const int64_t columns = c.columns();
  std::vector<int64_t> numbers{c.groups(), c.kv_groups(), c.n_q, c.n_k, c.d, c.d_v, c.bucket, c.backward, c.forward,
                               c.causal, c.prefix, c.offset, c.mask ? c.batch : 0, c.documents ? c.batch : 0, c.order,
                               c.bias ? c.bias_batch : 1, c.bias ? c.bias_heads : 1, c.bias && c.bias_rows,
                               c.bias ? c.period : 1, c.bias ? columns : 0, c.backward, c.emb ? columns : 0, c.own,
                               c.sinks && !c.sink_rows ? c.heads : 0, c.sinks && c.sink_rows, c.hide_self, threads,
                               level, ORIGIN[0], ORIGIN[1], c.beside};
  for (double real : {scale, c.softcap, c.rate}) {
    numbers.push_back(0);
    std::memcpy(&numbers.back(), &real, sizeof(real));
  }
  return numbers;
}

// Returns what `wanted` returns, computed by the kernel; nothing if the kernel fails.
std::vector<std::vector<float>> given(const Case &c, Inputs &x, const std::vector<int64_t> &numbers) {
  std::vector<float> statistics(2 * x.dlse.size());
  std::vector<std::vector<float>> to;
  for (size_t size : sizes_of(x)) to.emplace_back(size, NAN);
  const std::vector<int32_t> seed{x.seed};
  Operands forward;
  for (auto *tensor : {&x.q, &x.k, &x.v}) forward.add(*tensor);
  forward.add(x.mask).add(x.documents).add(x.order).add(x.bias).add(x.sinks).add(x.emb).add(x.emb_q).add(seed);
  forward.add(numbers);
  Operands backward = forward;
  if (forward.add(to[0]).add(statistics).add(to[1]).call(attention_forward)) return {};
  const std::vector<float> dout = c.beside > 1 ? tokens_first(c, x.dout, false) : x.dout;
  backward.add(to[0]).add(statistics).add(dout).add(x.dlse);
  for (size_t i = 2; i < to.size(); ++i) backward.add(to[i]);
  if (backward.call(attention_backward)) return {};
  if (c.beside > 1) to[0] = tokens_first(c, to[0], true);
  return to;
}

double scale_of(const Case &c) { return c.huge ? 1 : (c.softcap > 0 ? 3 : 1) / std::sqrt((double)c.d); }

Inputs draw_inputs(const Case &c, std::mt19937 &random) {
  std::normal_distribution<float> normal;
  auto draw = [&](int64_t size) {
    std::vector<float> x(size);
    for (float &y : x) y = normal(random);
    return x;
  };
  const int64_t columns = c.columns(), queries = c.groups() * c.n_q, keys = c.kv_groups() * c.n_k;
  Inputs x{draw(queries * c.d), draw(keys * c.d), draw(keys * c.d_v), draw(c.bias_size()), draw(c.sink_count()),
           draw(c.emb ? columns * c.d : 1), draw(c.own ? queries * c.d : 1), draw(queries * c.d_v), draw(queries),
           std::vector<char>(c.mask ? c.batch * c.n_k : 1),
           c.documents ? draw_documents(c, random) : std::vector<int32_t>(1),
           c.order ? draw_order(c, random) : std::vector<int32_t>(1), (int32_t)random()};
  for (char &real : x.mask) real = random() % 3 > 0;
  for (float &y : x.emb) y *= (float)(1 / std::sqrt((double)c.d));  // so that products with them are about 1
  for (float &y : x.dout) y *= (float)(1 / std::sqrt((double)c.d_v));
  if (c.bias && random() % 2)
    for (float &y : x.bias)
      if (random() % 4 == 0) y = -1e30f;  // hides
  if (c.sinks && random() % 3 == 0) x.sinks[0] = random() % 2 ? -INFINITY : 30;
  if (c.huge) {  // products beyond what float32 holds in units of log 2, but not beyond it
    for (float &q : x.q) q = random() % 2 ? 1 : -1;
    for (float &k : x.k) k = 2e38f + 1e35f * (float)(random() % 1000);
    for (float &y : x.dout) y *= .01f;
    for (float &y : x.dlse) y *= .01f;
  }
  return x;
}

// Returns the largest error, divided by the largest number of its tensor, or by a lower bound if that is larger.
double run(const Case &c, int64_t level, int64_t threads, std::mt19937 &random) {
  const int64_t keys = c.kv_groups() * c.n_k;
  const double scale = scale_of(c);
  Inputs x = draw_inputs(c, random);
  const bool poison = random() % 3 == 0;
  for (int64_t key = 0; poison && key < keys; ++key) {
    const int64_t at = key / (keys / c.batch) * c.n_k + key % c.n_k;
    const bool unseen = (c.mask && !x.mask[at]) || (c.documents && x.documents[2 * at] > x.documents[2 * at + 1]);
    if (unseen) std::fill_n(x.k.begin() + key * c.d, c.d, NAN), std::fill_n(x.v.begin() + key * c.d_v, c.d_v, NAN);
  }
  const auto truth = wanted(c, x, scale);
  // Keys that no query sees, by the order or the bias too, and that have a gradient of 0.
  for (int64_t key = 0; poison && key < keys; ++key) {
    const auto none = [&](const std::vector<double> &grad, int64_t d) {
      return std::all_of(&grad[key * d], &grad[key * d] + d, [](double y) { return y == 0; });
    };
    if (c.hide_self || c.huge || c.rate > 0 || !none(truth[3], c.d) || !none(truth[4], c.d_v)) continue;
    std::fill_n(x.k.begin() + key * c.d, c.d, NAN), std::fill_n(x.v.begin() + key * c.d_v, c.d_v, NAN);
  }
  // Queries that see nothing, and embeddings that no pair uses, have gradients of 0.
  const auto poison_unused = [&](std::vector<float> &of, const std::vector<double> &grad) {
    for (auto row = of.begin(), at = of.begin(); at != of.end(); at += c.d, row = at) {
      const auto from = grad.begin() + (row - of.begin());
      if (std::all_of(from, from + c.d, [](double y) { return y == 0; })) std::fill(row, row + c.d, NAN);
    }
  };
  if (poison && !c.hide_self && !c.huge) poison_unused(x.q, truth[2]);
  if (poison && c.emb && !c.hide_self) poison_unused(x.emb, truth[7]);
  if (poison && c.own && !c.hide_self) poison_unused(x.emb_q, truth[8]);
  const auto got = given(c, x, numbers_of(c, scale, level, threads));
  const auto again = given(c, x, numbers_of(c, scale, level, threads + 1));
  if (got.empty() || again.empty()) return INFINITY;
  double worst = 0;
  for (int i = 0; i < 9; ++i) {
    if ((i == 5 && !c.bias) || (i == 6 && !c.sinks) || (i == 7 && !c.emb) || (i == 8 && !c.own)) continue;
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

#include "native_check_rows.h"
#include "native_check_half.h"

// Those of the numbers that are divided by, or that are sizes of something.
enum Number : size_t { INTEGERS(NAMED) };
constexpr Number POSITIVE[] = {groups, kv_groups, n_q, n_k, head_dim, value_dim, bucket, bias_batch, heads, period,
                               threads, beside};

// Whether operators return an error, and read and write nothing outside their tensors, if numbers, shapes or types are
// not as they should be. Returns the number of calls that were refused, 0 if one that had to be was not.
int refused(std::mt19937 &random) {
  Case c{2, 4, 2, 70, 75, 8, 3, 1, 5, 3, 0, 0, 5, 4, true, true, true, true, true, false, 4, 1, 0, 0.3, false,
         true, true, true, 2, 2};
  Inputs x;
  const auto sized = [](std::initializer_list<int64_t> shape) {
    return std::vector<float>(std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>()), 0.5f);
  };
  x.q = x.emb_q = sized({8, 70, 8}), x.k = sized({4, 75, 8}), x.v = sized({4, 75, 3}), x.dout = sized({8, 70, 3});
  x.bias = sized({2, 4, 70, 9}), x.sinks = sized({8, 70}), x.order.resize(2 * 75);
  x.emb = sized({9, 8}), x.dlse = sized({8, 70}), x.mask.assign(2 * 75, 1), x.documents = draw_documents(c, random);
  const std::vector<int64_t> right = numbers_of(c, 1, 2, 2);
  int found = 0;
  for (size_t at = 0; at < right.size(); ++at)
    for (int64_t value : {INT64_MIN, int64_t{-5}, int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{3}, int64_t{1} << 31,
                          int64_t{1} << 32, int64_t{1} << 62, INT64_MAX}) {
      std::vector<int64_t> numbers = right;
      numbers[at] = value;
      const bool failed = given(c, x, numbers).empty();
      found += failed;
      const bool divides = std::count(std::begin(POSITIVE), std::end(POSITIVE), at);
      if (divides && value < 1 && !failed) return 0;
    }
  const std::vector<int64_t> rows{3, 2, 0};
  const std::vector<float> y(12);
  for (std::vector<int64_t> shape :
       {std::vector<int64_t>{}, {0}, {0, 4}, {3, 0}, {3, 5}, {-3, -4}, {2, 6}, {1LL << 62, 4}}) {
    const std::vector<float> gamma(4);
    const std::vector<int32_t> ids(12), bounds(24), one(1);
    Operands operands[] = {
        Operands().add(y).add(gamma).add(gamma).add(rows).add(y),
        Operands().add(y).add(gamma).add(rows).add(y).add(y).add(gamma).add(gamma),
        Operands().add(y).add(rows).add(gamma),
        Operands().add(y).add(rows).add(gamma).add(y),
        Operands().add(y).add(one).add(rows).add(y),
        Operands().add(y).add(one).add(rows).add(y).add(y).add(y),
        Operands().add(y).add(y).add(y).add(rows).add(y),
        Operands().add(y).add(y).add(y).add(one).add(one).add(rows).add(y),
        Operands().add(ids).add(bounds)};
    decltype(&rotary) operators[] = {layer_norm_forward, layer_norm_backward, geglu_forward, geglu_backward, rotary,
                                     split_heads, join_heads, enter_rings, document_bounds};
    for (int i = 0; i < 9; ++i) {
      operands[i].shapes[0] = shape;
      const bool fits = i == 8 && shape == std::vector<int64_t>{2, 6};
      if ((operands[i].call(operators[i]) == WRONG_CALL) == fits) return 0;
      operands[i].data.clear(), operands[i].shapes.clear(), operands[i].types.clear();
      if (operands[i].call(operators[i]) != WRONG_CALL) return 0;
      ++found;
    }
  }
  return found;
}

}  // namespace

int main(int count, char **arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 400;
  std::mt19937 random(7);
  for (int64_t batch : {1, 3})
    for (int64_t n : {1, 2, 17, 64, 301})
      if (!bounds_agree<int32_t>(batch, n, random) || !bounds_agree<int64_t>(batch, n, random)) {
        std::printf("bounds of documents: wrong for %d rows of %d\n", (int)batch, (int)n);
        return 1;
      }
  if (!halves_agree(random)) return std::printf("numbers of two bytes are not turned as they should be\n"), 1;
  const int errors = refused(random);
  if (!errors) return std::printf("an operator took a call that is not as it should be\n"), 1;
  std::printf("%d wrong calls refused\n", errors);
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
      c.bias_batch = 1, c.bias_rows = random() % 2;
      if (c.bias && c.bias_rows) c.bias_batch = pick({1, c.batch});
      c.sink_rows = random() % 2, c.own = c.emb && random() % 2, c.order = random() % 3 ? 0 : pick({1, c.batch});
      c.d_v = random() % 3 ? c.d : std::min<int64_t>(pick({1, 3, 8, 16, 20, 64, 257}), c.n_q > 200 ? 20 : 257);
      if (c.order) c.causal = 0;
      c.prefix = c.bias || c.emb ? 0 : pick({0, 1, 4, 70, 400, 600});
      c.rate = random() % 4 ? 0 : 0.3;
      constexpr int64_t FAR = 1LL << 62;
      if (!c.columns() && number % 5 == 0) {
        c.backward = pick({c.backward, FAR}), c.forward = c.causal ? 0 : pick({FAR - 1, -1});
      }
      if (!c.columns() && number % 10 == 0) c.bucket = pick({(1LL << 32), (1LL << 32) + 7, FAR});
      c.huge = number % 6 == 1 && !c.emb && !c.bias && !c.hide_self;
      if (c.huge) c.d = c.d_v = 1, c.softcap = 0;
      const bool crossing = number % 7 == 3 && !c.columns() && !c.order && !c.documents && !c.hide_self;
      if (crossing) {  // queries and keys whose positions mean nothing
        c.causal = 0, c.bucket = 1, c.backward = c.forward = FAR, c.offset = 0, c.n_k = pick({1, 5, 64, 90, 333});
      }
      const double error = std::max(run(c, level, 1 + number % 3, random), run_half(c, level, 1 + number % 3, random));
      worst = std::max(worst, error);
      if (!(error < 1e-5)) {
        std::printf("case %d at level %d: off by %g of the largest number\n", number, (int)level, error);
        std::printf("batch %d heads %d/%d n %d %d d %d %d span %d %d %d %d prefix %d offset %d mask %d documents %d "
                    "bias %d (%d rows, batch %d) sinks %d (%d) emb %d (%d) order %d hide_self %d softcap %g rate %g\n",
                    (int)c.batch, (int)c.heads, (int)c.share, (int)c.n_q, (int)c.n_k, (int)c.d, (int)c.d_v, (int)c.bucket,
                    (int)c.backward, (int)c.forward, (int)c.causal, (int)c.prefix, (int)c.offset, c.mask, c.documents,
                    c.bias ? (int)c.bias_heads : 0, c.bias_rows, (int)c.bias_batch, c.sinks, c.sink_rows, c.emb, c.own,
                    (int)c.order, c.hide_self, c.softcap, c.rate);
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
