/* Those of MindSpore's own kernels that report success in their last arguments. */
#include <stddef.h>

typedef long Size;

int uniform(long seed, long offset, void *state, int *low, size_t lows, int *high, size_t highs, int *out, size_t size,
            void *stream, _Bool *ok)
    __asm__("_Z10UniformIntIiE9cudaErrormmP24curandStatePhilox4_32_10PT_mS4_mS4_mP11CUstream_stPb");

int uniform(long seed, long offset, void *state, int *low, size_t lows, int *high, size_t highs, int *out, size_t size,
            void *stream, _Bool *ok) { *ok = 1; return 0; }

/* The length of a range. */
#define RANGE(type, letter)                                                                                          \
  int range_##letter(const type *start, const type *end, const type *step, Size *size, int *error, Size largest,     \
                     void *stream)                                                                                   \
      __asm__("_Z30CudaValidateInputAndInferShapeI" #letter "E9cudaErrorPKT_S3_S3_PlP21DynamicRangeErrorCodelP11CUstream_st"); \
  int range_##letter(const type *start, const type *end, const type *step, Size *size, int *error, Size largest,     \
                     void *stream) {                                                                                 \
    *size = *step > 0 && *end > *start ? (*end - *start + *step - 1) / *step : 1;                                    \
    if (*size > largest) *size = 1;                                                                                  \
    *error = 0;                                                                                                      \
    return 0;                                                                                                        \
  }
RANGE(int, i)
RANGE(long, l)
RANGE(float, f)
