// The CPU kernels of ../__init__.py, forward and backward: attention over the span of each query, and the layers
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
#include <iterator>
#include <memory>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __x86_64__
#include <cpuid.h>
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

constexpr int BLOCK_QUERIES = 64;
constexpr int FAILED = 1, WRONG_CALL = 2;  // what operators return if they cannot compute, or if numbers do not fit
constexpr int64_t FARTHEST = (1LL << 31) - BLOCK_QUERIES;  // positions are int32
constexpr int64_t MOST_THREADS = 1024;
constexpr int64_t WIDEST = 16;  // floats in the widest vector
constexpr float SELF_SCORE = -5e4f;  // as in backends/spans.py
constexpr int64_t SHARES = 32;  // parts that the rows of a layer are divided into
constexpr double THREAD_WORK = 1e6;  // multiply-adds that are worth starting a thread: about 0.03 ms of its time

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#include "call.h"
#include "threads.h"

// Every x86-64 processor has SSE2, every aarch64 one NEON. For others, the compiler splits vectors into single numbers.
#define KERNEL baseline
#define VECTOR_BYTES 16
#ifdef __x86_64__
#define REGISTERS 16
#else
#define REGISTERS 32
#endif
#include "kernel.h"
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

WITH_TARGET("avx2,fma,f16c")
#define KERNEL avx2
#define VECTOR_BYTES 32
#define REGISTERS 16
#include "kernel.h"
#undef KERNEL
#undef VECTOR_BYTES
#undef REGISTERS
END_TARGET

WITH_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define KERNEL avx512
#define VECTOR_BYTES 64
#define REGISTERS 32
#include "kernel.h"
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
  unsigned leaf[4] = {};
  __get_cpuid(1, &leaf[0], &leaf[1], &leaf[2], &leaf[3]);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (leaf[2] & bit_F16C)) return 1;
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

}  // namespace

#include "operators.h"

extern "C" {

// The names of what goes into a call of attention and comes out of it.
EXPORTED const char *attention_names() {
  return "inputs " INPUTS(TEXT) "\nresults " RESULTS(TEXT) "\nreceived " RECEIVED(TEXT) "\ngradients " GRADIENTS(TEXT)
         "\nnumbers " INTEGERS(TEXT) REALS(TEXT);
}

EXPORTED int attention_level() { return (int)highest_level(); }

}  // extern "C"

#include "attention.h"
#include "rows.h"
