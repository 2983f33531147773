// The CPU kernels of backends/native.py, forward and backward: attention over the span of each query, and the layers
// around it that are slow in plain operators.
//
// Attention works on tiles of queries by keys and never builds a whole matrix of scores. The forward pass is an online
// softmax (Milakov and Gimelshein, 2018). The backward pass computes the weights of each tile again, from the maxima
// and the sums of its rows (Dao et al., FlashAttention, 2022). The interface is plain C, as MindSpore's Custom operator
// of type "aot" calls it. The only headers are those of the C++ library, and of the compiler for x86-64.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

namespace {

constexpr int INTERFACE = 7;  // to be increased when what goes in or out changes; native.py compares it
constexpr int BLOCK_QUERIES = 64;
constexpr int64_t WIDEST = 16;  // floats in the widest vector
constexpr float SELF_SCORE = -5e4f, FAINT = -1e29f;  // as in backends/spans.py; an entry of a bias below hides its key
constexpr int64_t SHARES = 32;  // parts that the rows of a layer are divided into
constexpr double THREAD_WORK = 1e6;  // multiply-adds that are worth starting a thread: about 0.03 ms of its time

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#include "native_call.h"
#include "native_threads.h"

// Every x86-64 processor has SSE2, every aarch64 one NEON. For others, the compiler splits vectors into single numbers.
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

// The widest vectors that this machine has: 0 for the baseline, 1 for AVX2, 2 for AVX-512.
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

// Returns 0 if all went well, else 1: no exception may reach MindSpore.
template <typename Do>
int guarded(void **inputs, Do &&act) {
  try {
    const Call call(inputs);
    return act(call, kernel_of(call.level)) ? 0 : 1;
  } catch (const std::exception &) {
    return 1;
  }
}

// Acts on every row. The shares depend on the number of rows alone, so sums over them do not depend on threads.
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

// Moves every token of all batch entries. `numbers`: threads, level, the position of the first query, and d / 2
// frequencies in radians per position, or none for no rotation.
template <typename Function>
int guarded_heads(Heads heads, const void *numbers, int64_t count, Function Kernel::*move, float *rows,
                  float *const *parts) try {
  const int64_t shape[] = {heads.batch * heads.n, (heads.heads + 2 * heads.kv_heads) * heads.d};
  const Rows all(numbers, 2, shape);
  const int64_t shares = std::min(heads.n, SHARES), *number = (const int64_t *)numbers;
  heads.first_query = number[2], heads.frequencies.resize(count - 3);
  std::memcpy(heads.frequencies.data(), number + 3, (count - 3) * sizeof(double));
  const Kernel &kernel = kernel_of(all.level);
  return in_parallel<NoMemory>(all, shares, [&](NoMemory &, int64_t share) {
    (kernel.*move)(heads, share * heads.n / shares, (share + 1) * heads.n / shares, rows, parts);
  }) ? 0 : 1;
} catch (const std::exception &) {
  return 1;
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
// -> out, statistics (..., n_q, 2), lse (..., n_q)
// The statistics of a row are a score near its highest, and the inverse of the sum of weights relative to that score.
// lse holds the same information, but weights computed from it would have the error of its last digit.
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

// segment_ids (batch, n) -> the first and the last position of each position's document (batch, n, 2)
// Both are int32, or both int64. A document is a run of one id. A negative id is padding, which belongs to no document:
// its last is before its first.
EXPORTED int document_bounds(int, void **params, int *, int64_t **shapes, const char **types, void *, void *) {
  const auto find = [&](auto *ids, auto *bounds) {
    const int64_t batch = shapes[0][0], n = shapes[0][1];
    for (int64_t row = 0; row < batch; ++row, ids += n)
      for (int64_t first = 0, end; first < n; first = end) {
        for (end = first + 1; end < n && ids[end] == ids[first];) ++end;
        const bool padding = ids[first] < 0;
        for (int64_t j = first; j < end; ++j) *bounds++ = padding ? j : first, *bounds++ = padding ? j - 1 : end - 1;
      }
  };
  if (std::strcmp(types[0], "int32") == 0)
    find((const int32_t *)params[0], (int32_t *)params[1]);
  else
    find((const int64_t *)params[0], (int64_t *)params[1]);
  return 0;
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

// x (..., n, d), the position of the first of the n tokens (1), numbers -> y
// `numbers`: threads, level, whether to rotate back, d / 2 frequencies in radians per position.
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

// qkv (batch, n, (heads + 2 kv_heads) d), a tensor of shape (heads, kv_heads) that is not read, numbers as in
// `guarded_heads` -> q (batch, heads, n, d), k, v (batch, kv_heads, n, d), with q and k rotated
EXPORTED int split_heads(int, void **params, int *, int64_t **shapes, const char **, void *, void *) {
  const int64_t *qkv = shapes[0], heads = shapes[1][0], kv_heads = shapes[1][1];
  return guarded_heads({qkv[0], qkv[1], heads, kv_heads, qkv[2] / (heads + 2 * kv_heads), 0, {}}, params[2],
                       shapes[2][0], &Kernel::split_heads, (float *)params[0], (float **)params + 3);
}

// dq, dk, dv, numbers -> dqkv
EXPORTED int join_heads(int, void **params, int *, int64_t **shapes, const char **, void *, void *) {
  const int64_t *q = shapes[0];
  return guarded_heads({q[0], q[2], q[1], shapes[1][1], q[3], 0, {}}, params[3], shapes[3][0], &Kernel::join_heads,
                       (float *)params[4], (float **)params);
}

// qkv (batch, 1, (heads + 2 kv_heads) d) of one token, ring buffers of keys and of values (batch kv_heads,
// prefix + kept, d), the token's position (1), its position in each row (batch) or in all rows (1), numbers
// -> q (batch heads, 1, d)
// The key and the value are written into the ring buffers, in place. `numbers` are those of `rotary`, with the prefix
// in place of whether to rotate back, and without frequencies for no rotation.
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

// MindSpore asks these for the shapes and types of outputs. Python functions in their place would be lost when it
// compiles a part of a graph again while that graph runs. A type is one of MindSpore's type numbers; every output has
// the type of the first input.
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

EXPORTED std::vector<int64_t> document_boundsInferShape(int *, int64_t **shapes, void *) {
  return {shapes[0][0], shapes[0][1], 2};
}

EXPORTED int document_boundsInferType(std::vector<int> types, void *) { return types[0]; }

EXPORTED Shapes split_headsInferShape(int *, int64_t **shapes, void *) {
  const int64_t *qkv = shapes[0], heads = shapes[1][0], kv_heads = shapes[1][1];
  const int64_t d = qkv[2] / (heads + 2 * kv_heads);
  return {{qkv[0], heads, qkv[1], d}, {qkv[0], kv_heads, qkv[1], d}, {qkv[0], kv_heads, qkv[1], d}};
}

EXPORTED std::vector<int> split_headsInferType(std::vector<int> types, void *) {
  return std::vector<int>(3, types[0]);
}

EXPORTED std::vector<int64_t> join_headsInferShape(int *, int64_t **shapes, void *) {
  return {shapes[0][0], shapes[0][2], (shapes[0][1] + 2 * shapes[1][1]) * shapes[0][3]};
}

EXPORTED int join_headsInferType(std::vector<int> types, void *) { return types[0]; }

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
