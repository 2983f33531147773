// The kernels behind backends/native.py: attention over the span of each query, and what around it plain operators are
// slow at, forward and backward, on a CPU.
//
// Tiles of queries by keys, never a matrix of scores: an online softmax forward (Milakov and Gimelshein, 2018), each
// tile's weights computed again backward from its rows' maxima and sums (Dao et al., FlashAttention, 2022). A plain C
// interface, as MindSpore's Custom operator of type "aot" calls it, and no header of anyone's but the C++ library's.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

namespace {

constexpr int INTERFACE = 5;  // one more with every change of what native.py and this file hand each other
constexpr int BLOCK_QUERIES = 64;
constexpr int64_t WIDEST = 16;  // numbers in the widest vector
constexpr float SELF_SCORE = -5e4f;  // as in backends/dense.py
constexpr int64_t SHARES = 32;  // of the rows of a layer
constexpr double THREAD_WORK = 1e6;  // multiply-adds that are worth a thread's start, about 0.03 ms of one

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Dropout's hashes, as in backends/dropout.py.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

inline uint32_t row_hash(int64_t group, int64_t query) {
  return mix(mix((uint32_t)group + 0x9E3779B9u) + (uint32_t)query);
}

inline uint32_t column_hash(int64_t key) { return mix((uint32_t)key ^ 0x5BD1E995u); }

// Keys from the first to the last; none where that stands before it.
struct Span {
  int64_t first, last;
};

// One call: its tensors, and its numbers in the order in which native.py lists them.
struct Call {
  const float *q, *k, *v;    // (groups, n_q, head_dim), (kv_groups, n_k, head_dim) twice
  const bool *mask;          // (batch, n_k), true for a real key
  const int32_t *documents;  // (doc_batch, n_k, 2), the first and the last key of each one's document
  const float *bias;         // (heads, period, columns)
  const float *sinks;        // (sink_heads)
  const float *emb;          // (offsets, head_dim)
  uint32_t seed;

  int64_t groups, kv_groups, n_q, n_k, head_dim, bucket, spec_backward, spec_forward, causal, prefix, offset, batch,
      doc_batch, heads, period, columns, bias_backward, offsets, sink_heads, hide_self, threads, level;
  int64_t first_group, first_position;  // which of the whole the first ones here are, for dropout
  int64_t share;              // groups that read the same keys
  int64_t padded, bias_size;  // head_dim in whole vectors of any width, and a head's bias
  float scale, softcap, kept_factor;
  int32_t drop_below;
  bool dropping;

  explicit Call(void **inputs) {
    const int64_t *number = (const int64_t *)inputs[9];
    for (int64_t *to : {&groups, &kv_groups, &n_q, &n_k, &head_dim, &bucket, &spec_backward, &spec_forward, &causal,
                        &prefix, &offset, &batch, &doc_batch, &heads, &period, &columns, &bias_backward, &offsets,
                        &sink_heads, &hide_self, &threads, &level, &first_group, &first_position})
      *to = *number++;
    double real[3];  // these by their bits
    std::memcpy(real, number, sizeof(real));
    const double rate = real[2];
    scale = (float)real[0], softcap = (float)real[1], dropping = rate > 0, kept_factor = (float)(1 / (1 - rate));
    drop_below = (int32_t)((int64_t)(rate * 4294967296.) - 2147483648LL);
    q = (const float *)inputs[0], k = (const float *)inputs[1], v = (const float *)inputs[2];
    mask = batch ? (const bool *)inputs[3] : nullptr;
    documents = doc_batch ? (const int32_t *)inputs[4] : nullptr;
    bias = columns ? (const float *)inputs[5] : nullptr;
    sinks = sink_heads ? (const float *)inputs[6] : nullptr;
    emb = offsets ? (const float *)inputs[7] : nullptr;
    seed = *(const uint32_t *)inputs[8];
    prefix = std::min(prefix, n_k), share = groups / kv_groups;
    padded = divide_up(head_dim, WIDEST) * WIDEST, bias_size = period * columns;
  }

  // The document that a position stands in.
  Span document(int64_t group, int64_t position) const {
    if (!documents) return {0, n_k - 1};
    const int32_t *bounds = documents + 2 * (group / (groups / doc_batch) * n_k + position);
    return {bounds[0], bounds[1]};
  }

  // What the query at a position sees without its prefix, given where its bucket starts.
  Span span(int64_t position, int64_t start, const Span &within) const {
    int64_t last = start + bucket - 1 + spec_forward;
    if (causal) last = std::min(last, position);
    return {std::max(start - spec_backward, within.first), std::min(last, within.last)};
  }

  int64_t prefix_last(int64_t position, const Span &within) const {
    const int64_t last = std::min(within.first + prefix - 1, within.last);
    return causal ? std::min(last, position) : last;
  }

  double work() const {
    return 2. * groups * n_q * head_dim *
           std::min<double>(n_k, (double)spec_backward + bucket + spec_forward + prefix);
  }
};

// A call on rows of d numbers.
struct Rows {
  int64_t threads, level, count, d;
  float epsilon;

  Rows(const void *numbers, int axes, const int64_t *shape) : count(1), d(shape[axes - 1]) {
    const int64_t *number = (const int64_t *)numbers;
    double real;  // by its bits
    std::memcpy(&real, number + 2, sizeof(real));
    threads = number[0], level = number[1], epsilon = (float)real;
    for (int axis = 0; axis < axes - 1; ++axis) count *= shape[axis];
  }

  double work() const { return 16. * count * d; }
};

struct Outputs {
  float *out, *statistics, *lse;
};

struct Gradients {
  const float *out, *statistics, *dout, *dlse;
  float *dq, *dk, *dv;
  float *dsink_parts;  // (groups, blocks of queries)
};

// Queries of one group of keys that one thread works on, one block after the other.
struct Chunk {
  float *dbias, *demb;
  int64_t position;  // of its first query
  float *dprefix;    // (2, prefix, head_dim): of the prefix of a document that began before, gradients of keys, values
  int64_t cleared;
};

// Zeroes the gradients of a group's keys from `cleared` on, which moves, to another key: shortly before they are first
// added to, and not all at once, as they are then still in the cache.
void clear_keys(const Call &call, const Gradients &grads, int64_t group, int64_t &cleared, int64_t to) {
  if (to <= cleared) return;
  for (float *rows : {grads.dk, grads.dv})
    std::fill(rows + (group * call.n_k + cleared) * call.head_dim, rows + (group * call.n_k + to) * call.head_dim, 0.f);
  cleared = to;
}

// What native_kernel.h gives for one width of vectors.
struct Kernel {
  bool (*forward)(const Call &, const Outputs &);
  bool (*backward)(const Call &, Gradients, float *dbias, float *dsinks, float *demb);
  // one row
  void (*layer_norm)(const float *x, const float *gamma, const float *beta, float epsilon, int64_t d, float *y);
  void (*layer_norm_backward)(const float *x, const float *gamma, float epsilon, const float *dy, int64_t d, float *dx,
                              float *dgamma, float *dbeta);
  void (*geglu)(const float *x, int64_t d, float *y);
  void (*geglu_backward)(const float *x, const float *dy, int64_t d, float *dx);
  void (*rotate)(const float *x, const float *cosines, const float *sines, int64_t half, float *y);
};

// Does items 0 ... count - 1, each worker taking the next as it comes free; false where one of them threw.
template <typename Worker, typename Task, typename Do>
bool in_parallel(const Task &task, int64_t count, Do &&act) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> fine{true};
  auto work = [&] {
    try {
      Worker worker(task);
      for (int64_t item = next++; item < count; item = next++) act(worker, item);
    } catch (const std::exception &) {
      fine = false;
    }
  };
  const int64_t wanted = std::min<int64_t>({task.threads, count, 1 + (int64_t)(task.work() / THREAD_WORK)});
  std::vector<std::thread> others;
  for (int64_t i = 1; i < wanted; ++i) try {
      others.emplace_back(work);
    } catch (const std::exception &) {  // no thread to be had: those there are do it all
      break;
    }
  work();
  for (std::thread &other : others) other.join();
  return fine;
}

// What does not need a kernel's memory.
struct NoMemory {
  template <typename Task>
  explicit NoMemory(const Task &) {}
};

// Blocks go to threads some at a time, one after the other, as those next to each other see mostly the same keys: those
// of the groups that share a group of keys, and then those of the next queries.
template <typename Worker>
bool run_forward(const Call &call, const Outputs &outputs) {
  const int64_t blocks = divide_up(call.n_q, BLOCK_QUERIES), all = call.groups * blocks, each = blocks * call.share;
  const int64_t run = std::clamp<int64_t>(all / (8 * call.threads), 1, 4);
  return in_parallel<Worker>(call, divide_up(all, run), [&](Worker &worker, int64_t item) {
    for (int64_t block = item * run; block < std::min(item * run + run, all); ++block) {
      const int64_t group = block / each * call.share + block % call.share;
      const int64_t start = block % each / call.share * BLOCK_QUERIES;
      worker.forward(group, start, std::min(start + BLOCK_QUERIES, call.n_q), outputs);
    }
  });
}

// The sum of `count` rows of floats, in their order, in the first of them.
void sum_rows(std::vector<float> &rows, int64_t count) {
  const int64_t size = rows.size() / count;
  for (int64_t row = 1; row < count; ++row)
    for (int64_t x = 0; x < size; ++x) rows[x] += rows[row * size + x];
}

// Gradients of keys are summed where they belong. So that no two threads meet there, a sequence is worked on in chunks
// longer than a span: first those of even number, which have no key in common, then those of odd number, each with all
// the groups that share its keys. Only a prefix is seen from afar: a chunk has its own sums for the one of a document
// that began before it. Gradients of what heads or batch entries share are summed by one owner each, in slices, and the
// slices at the end: in an order that does not depend on which thread came first.
template <typename Worker>
bool run_backward(const Call &call, Gradients grads, float *dbias, float *dsinks, float *demb) {
  const int64_t after = call.prefix ? std::max(call.spec_forward, call.prefix) : call.spec_forward;
  const int64_t reach = std::min(call.spec_backward + after + 2 * call.bucket, call.n_q);
  const int64_t chunk = divide_up(std::max<int64_t>(reach, 4 * BLOCK_QUERIES), BLOCK_QUERIES) * BLOCK_QUERIES;
  const int64_t chunks = divide_up(call.n_q, chunk), blocks = divide_up(call.n_q, BLOCK_QUERIES);
  const int64_t owners = call.bias ? std::max<int64_t>(call.heads / call.share, 1) : call.emb ? 1 : call.kv_groups;
  const int64_t batch = call.kv_groups / owners;
  const int64_t emb_size = call.offsets * call.padded;
  int64_t slices = batch * divide_up(chunks, 2);
  if (call.bias || call.emb) slices = std::min(slices, divide_up(2 * call.threads, owners));
  const int64_t bias_size = call.heads * call.bias_size, owned = bias_size / owners;
  const int64_t prefix_size = call.prefix * call.head_dim;
  const auto uncleared = [](int64_t size) { return std::unique_ptr<float[]>(new float[size]); };
  const auto bias_parts = uncleared((slices - 1) * bias_size);  // for the first, there is dbias
  const auto prefix_parts = uncleared(call.kv_groups * chunks * 2 * prefix_size);
  std::vector<float> emb_parts(slices * owners * emb_size), sink_parts(call.sinks ? call.groups * blocks : 0);
  grads.dsink_parts = sink_parts.data();

  const auto first_key = [&](int64_t query) {  // at or before those that it or a later one sees of spans
    if (query == 0 || query >= call.n_q) return query ? call.n_k : 0;
    return std::clamp<int64_t>(call.offset + query + 1 - call.bucket - call.spec_backward, 0, call.n_k);
  };
  bool fine = true;
  for (int64_t parity = 0; parity < std::min<int64_t>(chunks, 2); ++parity) {
    const int64_t each = (chunks + 1 - parity) / 2, units = batch * each;
    fine = fine && in_parallel<Worker>(call, slices * owners, [&](Worker &worker, int64_t item) {
      const int64_t slice = item / owners, owner = item % owners;
      float *bias_part = slice ? bias_parts.get() + (slice - 1) * bias_size : dbias;
      if (!parity) std::fill_n(bias_part + owner * owned, owned, 0.f);
      for (int64_t unit = slice * units / slices; unit < (slice + 1) * units / slices; ++unit) {
        const int64_t number = unit % each * 2 + parity, from = number * chunk, to = std::min(from + chunk, call.n_q);
        const int64_t key_group = unit / each * owners + owner, group = key_group * call.share;
        float *prefix_part = prefix_parts.get() + (key_group * chunks + number) * 2 * prefix_size;
        if (call.document(group, call.offset + from).first < call.offset + from)
          std::fill_n(prefix_part, 2 * prefix_size, 0.f);
        Chunk state{bias_part, emb_parts.data() + item * emb_size, call.offset + from, prefix_part,
                    parity ? call.n_k : first_key(from)};
        for (int64_t start = from; start < to; start += BLOCK_QUERIES)
          for (int64_t i = 0; i < call.share; ++i)
            worker.backward(group + i, start, std::min(start + BLOCK_QUERIES, to), grads, state);
        clear_keys(call, grads, key_group, state.cleared, first_key(from + 2 * chunk));
      }
    });
  }
  for (int64_t number = 0; call.prefix && number < call.kv_groups * chunks; ++number) {
    const int64_t key_group = number / chunks, position = call.offset + number % chunks * chunk;
    const Span within = call.document(key_group * call.share, position);
    if (within.first == position) continue;
    const int64_t size = std::min(call.prefix, within.last - within.first + 1) * call.head_dim;
    const float *part = prefix_parts.get() + number * 2 * prefix_size;
    const int64_t at = (key_group * call.n_k + within.first) * call.head_dim;
    for (int64_t x = 0; x < size; ++x) grads.dk[at + x] += part[x], grads.dv[at + x] += part[prefix_size + x];
  }
  for (int64_t x = 0; x < (slices - 1) * bias_size; ++x) dbias[x % bias_size] += bias_parts[x];
  for (int64_t head = 0; head < call.sink_heads; ++head) {
    double total = 0;
    for (int64_t group = head; group < call.groups; group += call.sink_heads)
      for (int64_t block = 0; block < blocks; ++block) total += sink_parts[group * blocks + block];
    dsinks[head] = (float)total;
  }
  if (call.emb) {
    sum_rows(emb_parts, slices * owners);
    for (int64_t row = 0; row < call.offsets; ++row)
      std::copy_n(&emb_parts[row * call.padded], call.head_dim, demb + row * call.head_dim);
  }
  return fine;
}

// What any machine of this kind has: SSE2 or NEON; elsewhere the compiler makes single numbers of it.
#define KERNEL baseline
#define VECTOR_BYTES 16
#ifdef __x86_64__
#define REGISTERS 16
#else
#define REGISTERS 32
#endif
#include "native_kernel.h"
#undef KERNEL
#undef VECTOR_BYTES
#undef REGISTERS

#ifdef __x86_64__

#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define WITH_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define WITH_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

WITH_TARGET("avx2,fma")
#define KERNEL avx2
#define VECTOR_BYTES 32
#define REGISTERS 16
#include "native_kernel.h"
#undef KERNEL
#undef VECTOR_BYTES
#undef REGISTERS
END_TARGET

WITH_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define KERNEL avx512
#define VECTOR_BYTES 64
#define REGISTERS 32
#include "native_kernel.h"
#undef KERNEL
#undef VECTOR_BYTES
#undef REGISTERS
END_TARGET

#endif

// 0 for the baseline, 1 for AVX2, 2 for AVX-512: the widest vectors that this machine has.
int64_t highest_level() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

const Kernel &kernel_of([[maybe_unused]] int64_t level) {
#ifdef __x86_64__
  level = std::min(level, highest_level());
  if (level == 2) return avx512::kernel;
  if (level == 1) return avx2::kernel;
#endif
  return baseline::kernel;
}

// Nothing is thrown into MindSpore: 0 where all went well.
template <typename Do>
int guarded(void **inputs, Do &&act) {
  try {
    const Call call(inputs);
    return act(call, kernel_of(call.level)) ? 0 : 1;
  } catch (const std::exception &) {
    return 1;
  }
}

// Does every row, in shares that depend on nothing but how many there are.
template <typename Do>
int guarded_rows(const Rows &rows, int64_t shares, Do &&act) {
  try {
    const Kernel &kernel = kernel_of(rows.level);
    return in_parallel<NoMemory>(rows, shares, [&](NoMemory &, int64_t share) {
      for (int64_t row = share * rows.count / shares; row < (share + 1) * rows.count / shares; ++row)
        act(kernel, share, row);
    }) ? 0 : 1;
  } catch (const std::exception &) {
    return 1;
  }
}

typedef std::vector<std::vector<int64_t>> Shapes;

std::vector<int64_t> shape_of(int input, const int *ndims, int64_t *const *shapes) {
  return std::vector<int64_t>(shapes[input], shapes[input] + ndims[input]);
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

EXPORTED int attention_interface() { return INTERFACE; }

EXPORTED int attention_level() { return (int)highest_level(); }

// q, k, v, mask, documents, bias, sinks, emb, seed, numbers
// -> out, statistics (..., n_q, 2), lse (..., n_q). Statistics: of each row a score near the highest, and the inverse
// of the sum of weights relative to it. lse tells as much, but weights made from it would be off by its last digit.
EXPORTED int attention_forward(int, void **params, int *, int64_t **, const char **, void *, void *) {
  return guarded(params, [params](const Call &call, const Kernel &kernel) {
    float *const *out = (float *const *)params + 10;
    return kernel.forward(call, {out[0], out[1], out[2]});
  });
}

// the same inputs, out, statistics, dout, dlse -> dq, dk, dv, dbias, dsinks, demb
EXPORTED int attention_backward(int, void **params, int *, int64_t **, const char **, void *, void *) {
  return guarded(params, [params](const Call &call, const Kernel &kernel) {
    const float *const *in = (const float *const *)params + 10;
    float *const *out = (float *const *)params + 14;
    return kernel.backward(call, {in[0], in[1], in[2], in[3], out[0], out[1], out[2], nullptr}, out[3], out[4], out[5]);
  });
}

// x (..., d), gamma, beta, numbers -> y
EXPORTED int layer_norm_forward(int, void **params, int *ndims, int64_t **shapes, const char **, void *, void *) {
  const Rows rows(params[3], ndims[0], shapes[0]);
  const float *const *in = (const float *const *)params;
  return guarded_rows(rows, std::min(rows.count, SHARES), [&](const Kernel &kernel, int64_t, int64_t row) {
    kernel.layer_norm(in[0] + row * rows.d, in[1], in[2], rows.epsilon, rows.d, (float *)params[4] + row * rows.d);
  });
}

// x, gamma, numbers, dy -> dx, dgamma, dbeta
EXPORTED int layer_norm_backward(int, void **params, int *ndims, int64_t **shapes, const char **, void *, void *) try {
  const Rows rows(params[2], ndims[0], shapes[0]);
  const int64_t d = rows.d, shares = std::min(rows.count, SHARES);
  const float *const *in = (const float *const *)params;
  float *const *out = (float *const *)params + 4;
  std::vector<float> parts(shares * 2 * d);
  const int failed = guarded_rows(rows, shares, [&](const Kernel &kernel, int64_t share, int64_t row) {
    float *part = parts.data() + share * 2 * d;
    kernel.layer_norm_backward(in[0] + row * d, in[1], rows.epsilon, in[3] + row * d, d, out[0] + row * d, part,
                               part + d);
  });
  sum_rows(parts, shares);
  std::copy_n(parts.data(), d, out[1]);
  std::copy_n(parts.data() + d, d, out[2]);
  return failed;
} catch (const std::exception &) {
  return 1;
}

// x (..., 2 d), numbers -> y (..., d)
EXPORTED int geglu_forward(int, void **params, int *ndims, int64_t **shapes, const char **, void *, void *) {
  const Rows rows(params[1], ndims[0], shapes[0]);
  return guarded_rows(rows, std::min(rows.count, SHARES), [&](const Kernel &kernel, int64_t, int64_t row) {
    kernel.geglu((const float *)params[0] + row * rows.d, rows.d / 2, (float *)params[2] + row * rows.d / 2);
  });
}

// x, numbers, dy -> dx
EXPORTED int geglu_backward(int, void **params, int *ndims, int64_t **shapes, const char **, void *, void *) {
  const Rows rows(params[1], ndims[0], shapes[0]);
  const float *const *in = (const float *const *)params;
  return guarded_rows(rows, std::min(rows.count, SHARES), [&](const Kernel &kernel, int64_t, int64_t row) {
    kernel.geglu_backward(in[0] + row * rows.d, in[2] + row * rows.d / 2, rows.d / 2,
                          (float *)params[3] + row * rows.d);
  });
}

// x (..., n, d), the position of the first of n tokens (1), numbers: threads, level, whether back, radians a position
// for each half of d -> y
EXPORTED int rotary(int, void **params, int *ndims, int64_t **shapes, const char **, void *, void *) {
  const Rows rows(params[2], ndims[0], shapes[0]);
  const int64_t n = shapes[0][ndims[0] - 2], d = rows.d, half = d / 2, shares = std::min(n, SHARES);
  const int64_t *numbers = (const int64_t *)params[2], start = *(const int32_t *)params[1];
  const float *x = (const float *)params[0];
  float *y = (float *)params[3];
  const double sign = numbers[2] ? -1 : 1;
  try {
    std::vector<double> frequencies(half);
    std::memcpy(frequencies.data(), numbers + 3, half * sizeof(double));
    const Kernel &kernel = kernel_of(rows.level);
    return in_parallel<NoMemory>(rows, shares, [&](NoMemory &, int64_t share) {
      std::vector<float> cosines(half), sines(half);
      for (int64_t token = share * n / shares; token < (share + 1) * n / shares; ++token) {
        for (int64_t c = 0; c < half; ++c) {
          const double angle = (double)(start + token) * frequencies[c];
          cosines[c] = (float)std::cos(angle), sines[c] = (float)(sign * std::sin(angle));
        }
        for (int64_t row = token; row < rows.count; row += n)
          kernel.rotate(x + row * d, cosines.data(), sines.data(), half, y + row * d);
      }
    }) ? 0 : 1;
  } catch (const std::exception &) {
    return 1;
  }
}

// qkv (batch, 1, (heads + 2 kv_heads) d) of one token, keys and values (batch kv_heads, prefix + kept, d) that it is
// written into, in place, its position (1) and that in each row (batch), or in all of them (1), numbers as of rotary, but
// the prefix for whether back, and without radians for no rotation -> q (batch heads, 1, d)
EXPORTED int enter_rings(int, void **params, int *, int64_t **shapes, const char **, void *, void *) {
  const int64_t batch = shapes[0][0], groups = shapes[1][0], places = shapes[1][1], d = shapes[1][2];
  const int64_t *numbers = (const int64_t *)params[5], position = *(const int32_t *)params[3], prefix = numbers[2];
  const int64_t all = shapes[0][2] / d, kv_heads = groups / batch, heads = all - 2 * kv_heads, half = shapes[5][0] - 3;
  const int32_t *const rows = (const int32_t *)params[4];
  const float *qkv = (const float *)params[0];
  float *const kept_keys = (float *)params[1], *const kept_values = (float *)params[2], *const q = (float *)params[6];
  try {
    const Kernel &kernel = kernel_of(numbers[1]);
    std::vector<float> cosines(half), sines(half);
    for (int64_t c = 0; c < half; ++c) {
      double frequency;
      std::memcpy(&frequency, numbers + 3 + c, sizeof(double));
      cosines[c] = (float)std::cos(position * frequency), sines[c] = (float)std::sin(position * frequency);
    }
    const auto turned = [&](const float *from, float *to) {
      if (half)
        kernel.rotate(from, cosines.data(), sines.data(), half, to);
      else
        std::copy_n(from, d, to);
    };
    for (int64_t row = 0; row < batch; ++row) {
      const float *from = qkv + row * all * d, *keys = from + heads * d, *values = keys + kv_heads * d;
      for (int64_t head = 0; head < heads; ++head) turned(from + head * d, q + (row * heads + head) * d);
      const int64_t own = rows[shapes[4][0] > 1 ? row : 0];
      for (int64_t head = 0; head < kv_heads; ++head) {
        float *const to_keys = kept_keys + (row * kv_heads + head) * places * d;
        float *const to_values = kept_values + (row * kv_heads + head) * places * d;
        const int64_t to = (prefix + position % (places - prefix)) * d;
        turned(keys + head * d, to_keys + to);
        std::copy_n(values + head * d, d, to_values + to);
        if (own < prefix) {
          std::copy_n(to_keys + to, d, to_keys + own * d);
          std::copy_n(to_values + to, d, to_values + own * d);
        }
      }
    }
    return 0;
  } catch (const std::exception &) {
    return 1;
  }
}

// Shapes and types of what they give, for MindSpore; Python functions in their place would be lost where it compiles a
// part of a graph again while that runs. A type is one of its numbers; all are those of q.
EXPORTED Shapes attention_forwardInferShape(int *ndims, int64_t **shapes, void *) {
  const std::vector<int64_t> queries = shape_of(0, ndims, shapes);
  std::vector<int64_t> statistics = queries;
  statistics.back() = 2;
  return {queries, statistics, std::vector<int64_t>(queries.begin(), queries.end() - 1)};
}

EXPORTED std::vector<int> attention_forwardInferType(std::vector<int> types, void *) {
  return std::vector<int>(3, types[0]);
}

EXPORTED Shapes attention_backwardInferShape(int *ndims, int64_t **shapes, void *) {
  Shapes to;
  for (int input : {0, 1, 2, 5, 6, 7}) to.push_back(shape_of(input, ndims, shapes));
  return to;
}

EXPORTED std::vector<int> attention_backwardInferType(std::vector<int> types, void *) {
  return std::vector<int>(6, types[0]);
}

EXPORTED std::vector<int64_t> enter_ringsInferShape(int *, int64_t **shapes, void *) {
  return {shapes[0][0] * (shapes[0][2] / shapes[1][2]) - 2 * shapes[1][0], 1, shapes[1][2]};
}

EXPORTED int enter_ringsInferType(std::vector<int> types, void *) { return types[0]; }

EXPORTED std::vector<int64_t> rotaryInferShape(int *ndims, int64_t **shapes, void *) {
  return shape_of(0, ndims, shapes);
}

EXPORTED int rotaryInferType(std::vector<int> types, void *) { return types[0]; }

EXPORTED std::vector<int64_t> layer_norm_forwardInferShape(int *ndims, int64_t **shapes, void *) {
  return shape_of(0, ndims, shapes);
}

EXPORTED int layer_norm_forwardInferType(std::vector<int> types, void *) { return types[0]; }

EXPORTED Shapes layer_norm_backwardInferShape(int *ndims, int64_t **shapes, void *) {
  return {shape_of(0, ndims, shapes), shape_of(1, ndims, shapes), shape_of(1, ndims, shapes)};
}

EXPORTED std::vector<int> layer_norm_backwardInferType(std::vector<int> types, void *) {
  return std::vector<int>(3, types[0]);
}

EXPORTED std::vector<int64_t> geglu_forwardInferShape(int *ndims, int64_t **shapes, void *) {
  std::vector<int64_t> shape = shape_of(0, ndims, shapes);
  shape.back() /= 2;
  return shape;
}

EXPORTED int geglu_forwardInferType(std::vector<int> types, void *) { return types[0]; }

EXPORTED std::vector<int64_t> geglu_backwardInferShape(int *ndims, int64_t **shapes, void *) {
  return shape_of(0, ndims, shapes);
}

EXPORTED int geglu_backwardInferType(std::vector<int> types, void *) { return types[0]; }

}  // extern "C"
