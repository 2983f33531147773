// Numbers of two bytes, float16 and bfloat16: rows of them become float32 where they are read, and back where results
// are written, rounded to the nearest. A part of kernel.h.

typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

INLINE Vec from_bfloat16(Halves x) { return (Vec)(__builtin_convertvector(x, Bits) << 16); }

INLINE Halves to_bfloat16(Vec x) {
  const Bits bits = (Bits)x, rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return __builtin_convertvector((x == x ? rounded : bits | 0x400000) >> 16, Halves);
}

INLINE Vec from_float16(Halves x) {
#if VECTOR_BYTES == 64
  return _mm512_maskz_cvtph_ps(-1, (__m256i)x);
#elif VECTOR_BYTES == 32
  return _mm256_cvtph_ps((__m128i)x);
#else
  const Bits bits = __builtin_convertvector(x, Bits), size = bits & 0x7FFF;
  const Vec finite = (Vec)(size << 13) * 0x1p112f;  // from the one exponent's bias to the other's
  const Bits found = size >= 0x7C00 ? size << 13 | 0x7F800000 : (Bits)finite;
  return (Vec)(found | (bits & 0x8000) << 16);
#endif
}

INLINE Halves to_float16(Vec x) {
#if VECTOR_BYTES == 64
  return (Halves)_mm512_maskz_cvtps_ph(-1, x, _MM_FROUND_TO_NEAREST_INT);
#elif VECTOR_BYTES == 32
  return (Halves)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const Bits bits = (Bits)x, size = bits & 0x7FFFFFFF;
  const Bits normal = (size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13;
  const Bits small = (Bits)((Vec)size + 0.5f) - 0x3F000000;  // below 2^-14, where the last place is always 2^-24
  const Bits large = size > 0x7F800000 ? Bits{} + 0x7E00 : Bits{} + 0x7C00;
  const Bits found = size >= 0x47800000 ? large : size < 0x38800000 ? small : normal;
  return __builtin_convertvector(found | (bits >> 16 & 0x8000), Halves);
#endif
}

// to[i] = from[i], for a row of `count` numbers.
template <typename To, typename From, typename Turn>
INLINE void turn_row(const From *from, To *to, int64_t count, Turn &&turned) {
  typedef decltype(turned(load<std::conditional_t<sizeof(From) == 2, Halves, Vec>>(from))) Into;
  typedef std::conditional_t<sizeof(From) == 2, Halves, Vec> Of;
  int64_t c = 0;
  for (; c + WIDTH <= count; c += WIDTH) store(to + c, (Into)turned(load<Of>(from + c)));
  if (c == count) return;
  From edge[WIDTH]{};
  To edge_to[WIDTH];
  std::copy_n(from + c, count - c, edge);
  store(edge_to, (Into)turned(load<Of>(edge)));
  std::copy_n(edge_to, count - c, to + c);
}

// Turns `rows` rows of numbers of two bytes into float32, one after the other.
NEVER_INLINE void to_floats(Type type, const uint16_t *from, int64_t stride, int64_t rows, int64_t width, float *to) {
  if (stride == width) width *= rows, rows = 1;
  for (int64_t row = 0; row < rows; ++row, from += stride, to += width)
    if (type == Type::BFLOAT16)
      turn_row(from, to, width, from_bfloat16);
    else
      turn_row(from, to, width, from_float16);
}

NEVER_INLINE void to_halves(Type type, const float *from, int64_t rows, int64_t width, uint16_t *to, int64_t stride) {
  if (stride == width) width *= rows, rows = 1;
  for (int64_t row = 0; row < rows; ++row, from += width, to += stride)
    if (type == Type::BFLOAT16)
      turn_row(from, to, width, to_bfloat16);
    else
      turn_row(from, to, width, to_float16);
}
