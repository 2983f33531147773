// Numbers of two bytes in the kernel: a part of native_check.cpp.

// Turns one number, by its definition: sign, exponent and fraction.
float wide_of(uint16_t x, Type type) {
  const int places = type == Type::FLOAT16 ? 10 : 7, bias = type == Type::FLOAT16 ? 15 : 127;
  const int exponent = x >> places & (2 * bias + 1), fraction = x & ((1 << places) - 1);
  const double size = exponent == 2 * bias + 1 ? (fraction ? NAN : INFINITY)
                      : exponent ? std::ldexp((1 << places) + fraction, exponent - bias - places)
                                 : std::ldexp(fraction, 1 - bias - places);
  return (float)(x >> 15 ? -size : size);
}

// Rounds one number to the nearest, and to an even fraction in between.
uint16_t half_of(float x, Type type) {
  const int places = type == Type::FLOAT16 ? 10 : 7, bias = type == Type::FLOAT16 ? 15 : 127;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0, infinite = (2 * bias + 1) << places;
  if (std::isnan(x)) return sign | infinite | 1 << (places - 1);
  if (std::isinf(x)) return sign | infinite;
  const int exponent = x == 0 ? 1 - bias : std::max(std::ilogb(x), 1 - bias);
  const double fraction = std::nearbyint(std::ldexp(std::fabs((double)x), places - exponent));
  // a fraction that is rounded up to the next power of two adds one to the exponent
  const int64_t found = ((int64_t)(exponent + bias - 1) << places) + (int64_t)fraction;
  return sign | (uint16_t)std::min<int64_t>(found, infinite);
}

// Whether each width of vectors turns every number of two bytes, and many of four, as these do.
bool halves_agree(std::mt19937 &random) {
  std::vector<float> numbers;
  for (int x = 0; x < 1 << 16; ++x)
    for (Type type : {Type::FLOAT16, Type::BFLOAT16}) {
      const float at = wide_of((uint16_t)x, type), next = wide_of((uint16_t)(x + 1), type), middle = at / 2 + next / 2;
      for (float y : {at, middle, std::nextafter(middle, INFINITY), std::nextafter(middle, -INFINITY)})
        numbers.push_back(y);
    }
  for (int i = 0; i < 1 << 16; ++i) {
    const uint32_t bits = random();
    numbers.emplace_back();
    std::memcpy(&numbers.back(), &bits, 4);
  }
  std::vector<uint16_t> all(1 << 16), back(numbers.size());
  std::iota(all.begin(), all.end(), 0);
  std::vector<float> wide(all.size());
  const auto agree = [&](auto &&widen, auto &&narrow) {
    for (Type type : {Type::FLOAT16, Type::BFLOAT16}) {
      widen(type, all.data(), 257, 255, 257, wide.data());
      narrow(type, numbers.data(), numbers.size() / 4, 4, back.data(), 4);
      for (int i = 0; i < 255 * 257; ++i) {
        const float truth = wide_of(all[i], type);
        if (std::isnan(truth) ? !std::isnan(wide[i]) : std::memcmp(&truth, &wide[i], 4)) return false;
      }
      for (size_t i = 0; i < numbers.size(); ++i)
        if (std::isnan(numbers[i]) ? !std::isnan(wide_of(back[i], type)) : back[i] != half_of(numbers[i], type))
          return false;
    }
    return true;
  };
  bool fine = agree(baseline::to_floats, baseline::to_halves);
#ifdef __x86_64__
  if (highest_level() > 0) fine = fine && agree(avx2::to_floats, avx2::to_halves);
  if (highest_level() > 1) fine = fine && agree(avx512::to_floats, avx512::to_halves);
#endif
  return fine;
}

// Calls the kernel with numbers of two bytes, and with the same numbers as float32. Every result has to be that of the
// latter, rounded: returns infinity if one is not.
double run_half(const Case &c, int64_t level, int64_t threads, std::mt19937 &random) {
  const Type type = random() % 2 ? Type::FLOAT16 : Type::BFLOAT16;
  if (c.huge) return 0;
  Inputs x = draw_inputs(c, random);
  const std::vector<int64_t> numbers = numbers_of(c, scale_of(c), level, threads);
  const std::vector<int32_t> seed{x.seed};
  const auto narrow = [&](const std::vector<float> &from) {
    std::vector<uint16_t> to;
    for (float y : from) to.push_back(half_of(y, type));
    return to;
  };
  const auto widened = [&](const std::vector<uint16_t> &from) {
    std::vector<float> to;
    for (uint16_t y : from) to.push_back(wide_of(y, type));
    return to;
  };
  const std::vector<uint16_t> q = narrow(x.q), k = narrow(x.k), v = narrow(x.v), dout = narrow(x.dout);
  x.q = widened(q), x.k = widened(k), x.v = widened(v), x.dout = widened(dout);
  // Returns out, statistics, lse and then the gradients, of inputs of either type.
  const auto results = [&](auto &&of_q, auto &&of_k, auto &&of_v, auto &&of_dout, auto zero) {
    typedef std::vector<decltype(zero)> Typed;
    Typed out(x.dout.size()), dq(x.q.size()), dk(x.k.size()), dv(x.v.size());
    std::vector<float> statistics(2 * x.dlse.size()), lse(x.dlse.size()), dbias(x.bias.size()), dsinks(x.sinks.size()),
        demb(x.emb.size()), demb_q(x.emb_q.size());
    Operands forward;
    forward.half = type;
    forward.add(of_q).add(of_k).add(of_v).add(x.mask).add(x.documents).add(x.order).add(x.bias).add(x.sinks);
    forward.add(x.emb).add(x.emb_q).add(seed).add(numbers);
    Operands backward = forward;
    bool failed = forward.add(out).add(statistics).add(lse).call(attention_forward);
    if constexpr (sizeof(zero) == 4) {  // the backward pass gets the output as it was rounded
      const Typed exact = out;
      out = widened(narrow(exact));
      backward.add(out).add(statistics).add(of_dout).add(x.dlse).add(dq).add(dk).add(dv);
      backward.add(dbias).add(dsinks).add(demb).add(demb_q);
      failed = failed || backward.call(attention_backward);
      return std::pair{std::vector<std::vector<uint16_t>>{narrow(out), narrow(dq), narrow(dk), narrow(dv)},
                       std::vector<std::vector<float>>{statistics, lse, dbias, dsinks, demb, demb_q, {(float)failed}}};
    } else {
      backward.add(out).add(statistics).add(of_dout).add(x.dlse).add(dq).add(dk).add(dv);
      backward.add(dbias).add(dsinks).add(demb).add(demb_q);
      failed = failed || backward.call(attention_backward);
      return std::pair{std::vector<std::vector<uint16_t>>{out, dq, dk, dv},
                       std::vector<std::vector<float>>{statistics, lse, dbias, dsinks, demb, demb_q, {(float)failed}}};
    }
  };
  const auto halves = results(q, k, v, dout, uint16_t{}), floats = results(x.q, x.k, x.v, x.dout, 0.f);
  if (halves.second.back()[0] || floats.second.back()[0] || halves.first != floats.first) return INFINITY;
  for (size_t i = 0; i < halves.second.size(); ++i)
    if (std::memcmp(halves.second[i].data(), floats.second[i].data(), 4 * halves.second[i].size())) return INFINITY;
  return 0;
}
