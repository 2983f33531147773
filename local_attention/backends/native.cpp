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
#include <stdexcept>
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

constexpr int INTERFACE = 8;  // to be increased when what goes in or out changes; native.py compares it
constexpr int BLOCK_QUERIES = 64;
constexpr int FAILED = 1, WRONG_CALL = 2;  // what operators return if they cannot compute, or if numbers do not fit
constexpr int64_t FARTHEST = (1LL << 31) - BLOCK_QUERIES;  // positions are int32
constexpr int64_t MOST_THREADS = 1024;
constexpr int64_t WIDEST = 16;  // floats in the widest vector
constexpr float SELF_SCORE = -5e4f;  // as in backends/spans.py
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

// Returns 0 if all went well: no exception may reach MindSpore.
template <typename Do>
int guarded(Do &&act) {
  try {
    return act() ? 0 : FAILED;
  } catch (const std::invalid_argument &) {
    return WRONG_CALL;
  } catch (const std::exception &) {
    return FAILED;
  }
}

// Acts on every row. The shares depend on the number of rows alone, so sums over them do not depend on threads.
template <typename Do>
bool over_rows(const Rows &rows, int64_t shares, Do &&act) {
  const Kernel &kernel = kernel_of(rows.level);
  return in_parallel<NoMemory>(rows, shares, [&](NoMemory &, int64_t share) {
    for (int64_t row = share * rows.count / shares; row < (share + 1) * rows.count / shares; ++row)
      act(kernel, share, row);
  });
}

// Moves every token of all batch entries. `numbers`: threads, level, the position of the first query, frequencies.
template <typename Function>
bool move_all_heads(const Tensors &x, Heads heads, int numbers, Function Kernel::*move, int rows, int parts) {
  heads.frequencies = frequencies_of(x, numbers, heads.d);
  const int64_t *number = (const int64_t *)x.data[numbers];
  heads.first_query = number[2];
  const double each = (double)heads.batch * heads.n * heads.d;
  float *const row = x.floats(rows, each * (heads.heads + 2 * heads.kv_heads));
  float *const part[] = {x.floats(parts, each * heads.heads), x.floats(parts + 1, each * heads.kv_heads),
                         x.floats(parts + 2, each * heads.kv_heads)};
  Rows all(x, number);
  all.count = heads.batch * heads.n, all.d = (heads.heads + 2 * heads.kv_heads) * heads.d;
  const int64_t shares = std::min(heads.n, SHARES);
  const Kernel &kernel = kernel_of(all.level);
  return in_parallel<NoMemory>(all, shares, [&](NoMemory &, int64_t share) {
    (kernel.*move)(heads, share * heads.n / shares, (share + 1) * heads.n / shares, row, part);
  });
}

typedef std::vector<std::vector<int64_t>> Shapes;

std::vector<int64_t> shape_of(int input, const int *ndims, int64_t *const *shapes) {
  return std::vector<int64_t>(shapes[input], shapes[input] + ndims[input]);
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))
// A function as MindSpore calls it. `x` are its tensors; its body returns whether it could compute.
#define OPERATOR(name)                                                                                             \
  static bool name##_of(const Tensors &x);                                                                         \
  EXPORTED int name(int count, void **data, int *axes, int64_t **shapes, const char **types, void *, void *) {     \
    return guarded([&] { return expect(count > 0), name##_of({count, data, axes, shapes, types}); });              \
  }                                                                                                                \
  static bool name##_of(const Tensors &x)

extern "C" {

EXPORTED int attention_interface() { return INTERFACE; }

EXPORTED int attention_level() { return (int)highest_level(); }

// q, k, v, mask, documents, bias, sinks, emb, seed, numbers
// -> out, statistics (..., n_q, 2), lse (..., n_q)
// The statistics of a row are a score near its highest, and the inverse of the sum of weights relative to that score.
// lse holds the same information, but weights computed from it would have the error of its last digit.
OPERATOR(attention_forward) {
  const Call call(x);
  const double rows = (double)call.groups * call.n_q;
  return kernel_of(call.level).forward(
      call, {x.floats(10, rows * call.head_dim), x.floats(11, rows * 2), x.floats(12, rows)});
}

// the same inputs, out, statistics, dout, dlse -> dq, dk, dv, dbias, dsinks, demb
OPERATOR(attention_backward) {
  const Call call(x);
  const double rows = (double)call.groups * call.n_q, queries = rows * call.head_dim;
  const double keys = (double)call.kv_groups * call.n_k * call.head_dim;
  const Gradients grads{x.floats(10, queries), x.floats(11, rows * 2), x.floats(12, queries), x.floats(13, rows),
                        x.floats(14, queries), x.floats(15, keys), x.floats(16, keys), nullptr};
  return kernel_of(call.level).backward(
      call, grads, call.bias ? x.floats(17, (double)call.heads * call.bias_size) : nullptr,
      call.sinks ? x.floats(18, call.sink_heads) : nullptr,
      call.emb ? x.floats(19, (double)call.offsets * call.head_dim) : nullptr);
}

// segment_ids (batch, n) -> the first and the last position of each position's document (batch, n, 2)
// Both are int32, or both int64. A document is a run of one id. A negative id is padding, which belongs to no document:
// its last is before its first.
OPERATOR(document_bounds) {
  const int64_t batch = x.shape(0, 2)[0], n = x.shape(0, 2)[1];
  const auto find = [&](auto *ids, auto *bounds) {
    for (int64_t row = 0; row < batch; ++row, ids += n)
      for (int64_t first = 0, end; first < n; first = end) {
        for (end = first + 1; end < n && ids[end] == ids[first];) ++end;
        const bool padding = ids[first] < 0;
        for (int64_t j = first; j < end; ++j) *bounds++ = padding ? j : first, *bounds++ = padding ? j - 1 : end - 1;
      }
  };
  const double size = (double)batch * n;
  if (std::strcmp(x.types[0], "int32") == 0)
    find(x.get<const int32_t>(0, "int32", size), x.get<int32_t>(1, "int32", 2 * size));
  else
    find(x.get<const int64_t>(0, "int64", size), x.get<int64_t>(1, "int64", 2 * size));
  return true;
}

// x (..., d), gamma, beta, numbers -> y
OPERATOR(layer_norm_forward) {
  const int64_t *number = x.numbers(3, 3);
  const Rows rows(x, number);
  const float *from = x.floats(0, rows.size()), *gamma = x.floats(1, rows.d), *beta = x.floats(2, rows.d);
  float *y = x.floats(4, rows.size());
  return over_rows(rows, std::min(rows.count, SHARES), [&](const Kernel &kernel, int64_t, int64_t row) {
    kernel.layer_norm(from + row * rows.d, gamma, beta, epsilon_of(number), rows.d, y + row * rows.d);
  });
}

// x, gamma, numbers, dy -> dx, dgamma, dbeta
OPERATOR(layer_norm_backward) {
  const int64_t *number = x.numbers(2, 3);
  const Rows rows(x, number);
  const int64_t d = rows.d, shares = std::min(rows.count, SHARES);
  const float *from = x.floats(0, rows.size()), *gamma = x.floats(1, d), *dy = x.floats(3, rows.size());
  float *dx = x.floats(4, rows.size()), *dgamma = x.floats(5, d), *dbeta = x.floats(6, d);
  std::vector<float> parts(shares * 2 * d);
  const bool fine = over_rows(rows, shares, [&](const Kernel &kernel, int64_t share, int64_t row) {
    float *part = parts.data() + share * 2 * d;
    kernel.layer_norm_backward(from + row * d, gamma, epsilon_of(number), dy + row * d, d, dx + row * d, part,
                               part + d);
  });
  sum_rows(parts, shares);
  std::copy_n(parts.data(), d, dgamma);
  std::copy_n(parts.data() + d, d, dbeta);
  return fine;
}

// x (..., 2 d), numbers -> y (..., d)
OPERATOR(geglu_forward) {
  const Rows rows(x, x.numbers(1, 3));
  const int64_t half = rows.d / 2;
  expect(rows.d % 2 == 0);
  const float *from = x.floats(0, rows.size());
  float *y = x.floats(2, rows.size() / 2);
  return over_rows(rows, std::min(rows.count, SHARES), [&](const Kernel &kernel, int64_t, int64_t row) {
    kernel.geglu(from + row * rows.d, half, y + row * half);
  });
}

// x, numbers, dy -> dx
OPERATOR(geglu_backward) {
  const Rows rows(x, x.numbers(1, 3));
  const int64_t half = rows.d / 2;
  expect(rows.d % 2 == 0);
  const float *from = x.floats(0, rows.size()), *dy = x.floats(2, rows.size() / 2);
  float *dx = x.floats(3, rows.size());
  return over_rows(rows, std::min(rows.count, SHARES), [&](const Kernel &kernel, int64_t, int64_t row) {
    kernel.geglu_backward(from + row * rows.d, dy + row * half, half, dx + row * rows.d);
  });
}

// x (..., n, d), the position of the first of the n tokens (1), numbers -> y
// `numbers`: threads, level, whether to rotate back, d / 2 frequencies in radians per position.
OPERATOR(rotary) {
  const int axes = x.axes[0];
  expect(axes > 1);
  const int64_t n = x.shape(0, axes)[axes - 2], d = x.shape(0, axes)[axes - 1], half = d / 2;
  const std::vector<double> frequencies = frequencies_of(x, 2, d);
  expect(!frequencies.empty());
  const int64_t *number = (const int64_t *)x.data[2], start = *x.get<const int32_t>(1, "int32", 1);
  const Rows rows(x, number);
  const float *from = x.floats(0, rows.size());
  float *y = x.floats(3, rows.size());
  const double sign = number[2] ? -1 : 1;
  const int64_t shares = std::min(n, SHARES);
  const Kernel &kernel = kernel_of(rows.level);
  return in_parallel<NoMemory>(rows, shares, [&](NoMemory &, int64_t share) {
    std::vector<float> cosines(half), sines(half);
    for (int64_t token = share * n / shares; token < (share + 1) * n / shares; ++token) {
      for (int64_t c = 0; c < half; ++c) {
        const double angle = (double)(start + token) * frequencies[c];
        cosines[c] = (float)std::cos(angle), sines[c] = (float)(sign * std::sin(angle));
      }
      for (int64_t row = token; row < rows.count; row += n)
        kernel.rotate(from + row * d, cosines.data(), sines.data(), half, y + row * d);
    }
  });
}

// qkv (batch, n, (heads + 2 kv_heads) d), a tensor of shape (heads, kv_heads) that is not read, numbers as in
// `move_all_heads` -> q (batch, heads, n, d), k, v (batch, kv_heads, n, d), with q and k rotated
OPERATOR(split_heads) {
  const int64_t *qkv = x.shape(0, 3), heads = x.shape(1, 2)[0], kv_heads = x.shape(1, 2)[1];
  expect(heads < FARTHEST && kv_heads < FARTHEST);
  return move_all_heads(x, {qkv[0], qkv[1], heads, kv_heads, qkv[2] / (heads + 2 * kv_heads), 0, {}}, 2,
                        &Kernel::split_heads, 0, 3);
}

// dq, dk, dv, numbers -> dqkv
OPERATOR(join_heads) {
  const int64_t *q = x.shape(0, 4);
  return move_all_heads(x, {q[0], q[2], q[1], x.shape(1, 4)[1], q[3], 0, {}}, 3, &Kernel::join_heads, 4, 0);
}

// qkv (batch, 1, (heads + 2 kv_heads) d) of one token, ring buffers of keys and of values (batch kv_heads,
// prefix + kept, d), the token's position (1), its position in each row (batch) or in all rows (1), numbers
// -> q (batch heads, 1, d)
// The key and the value are written into the ring buffers, in place. `numbers` are those of `rotary`, with the prefix
// in place of whether to rotate back, and without frequencies for no rotation.
OPERATOR(enter_rings) {
  const int64_t *qkv = x.shape(0, 3), batch = qkv[0], groups = x.shape(1, 3)[0], places = x.shape(1, 3)[1],
                d = x.shape(1, 3)[2], all = qkv[2] / d, kv_heads = groups / batch, heads = all - 2 * kv_heads;
  const std::vector<double> frequencies = frequencies_of(x, 5, d);
  const int64_t *number = (const int64_t *)x.data[5], prefix = number[2], half = frequencies.size();
  const int64_t position = *x.get<const int32_t>(3, "int32", 1), own_rows = x.shape(4, 1)[0];
  const int32_t *const rows = x.get<const int32_t>(4, "int32", own_rows);
  expect(qkv[1] == 1 && groups % batch == 0 && heads > 0 && (own_rows == 1 || own_rows == batch));
  expect(position >= 0 && prefix >= 0 && prefix < places);
  const double size = (double)groups * places * d;
  float *const kept_keys = x.floats(1, size), *const kept_values = x.floats(2, size);
  float *const q = x.floats(6, (double)batch * heads * d);
  const float *const tokens = x.floats(0, (double)batch * all * d);
  const Kernel &kernel = kernel_of(number[1]);
  std::vector<float> cosines(half), sines(half);
  for (int64_t c = 0; c < half; ++c) {
    const double angle = position * frequencies[c];
    cosines[c] = (float)std::cos(angle), sines[c] = (float)std::sin(angle);
  }
  const auto turned = [&](const float *from, float *to) {
    if (half)
      kernel.rotate(from, cosines.data(), sines.data(), half, to);
    else
      std::copy_n(from, d, to);
  };
  for (int64_t row = 0; row < batch; ++row) {
    const float *from = tokens + row * all * d, *keys = from + heads * d, *values = keys + kv_heads * d;
    for (int64_t head = 0; head < heads; ++head) turned(from + head * d, q + (row * heads + head) * d);
    const int64_t own = rows[own_rows > 1 ? row : 0];
    for (int64_t head = 0; head < kv_heads; ++head) {
      float *const to_keys = kept_keys + (row * kv_heads + head) * places * d;
      float *const to_values = kept_values + (row * kv_heads + head) * places * d;
      const int64_t to = (prefix + position % (places - prefix)) * d;
      turned(keys + head * d, to_keys + to);
      std::copy_n(values + head * d, d, to_values + to);
      if (0 <= own && own < prefix) {
        std::copy_n(to_keys + to, d, to_keys + own * d);
        std::copy_n(to_values + to, d, to_values + own * d);
      }
    }
  }
  return true;
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
  const int64_t d = qkv[2] / std::max<int64_t>(heads + 2 * kv_heads, 1);
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
  return {shapes[0][0] * (shapes[0][2] / std::max<int64_t>(shapes[1][2], 1)) - 2 * shapes[1][0], 1, shapes[1][2]};
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
