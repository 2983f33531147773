// What works row by row, and the bounds of documents: a part of native_check.cpp.

// Whether `document_bounds` agrees with a search from each position for both ends of its run of one id. There are runs
// of length 1, padding with several ids, an id that comes again after another, and ids of all bits.
template <typename Id>
bool bounds_agree(int64_t batch, int64_t n, std::mt19937 &random) {
  std::vector<Id> ids(batch * n), bounds(2 * batch * n, -7);
  const Id highest = std::numeric_limits<Id>::max(), drawn[] = {0, 0, 0, 1, -1, -100, highest, -highest};
  for (int64_t at = 0; at < batch * n; ++at) ids[at] = at && random() % 4 ? ids[at - 1] : drawn[random() % 8];
  if (Operands().add(ids, {batch, n}).add(bounds).call(document_bounds)) return false;
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

  std::vector<float> x = draw(count * d), gamma = draw(d), beta = draw(d), dy = draw(count * d), y(count * d),
                     dx(count * d), dgamma(d), dbeta(d);
  const std::vector<int64_t> rows{count, d}, wide_rows{count, 2 * d};
  if (Operands().add(x, rows).add(gamma).add(beta).add(numbers).add(y).call(layer_norm_forward)) return INFINITY;
  if (Operands().add(x, rows).add(gamma).add(numbers).add(dy).add(dx).add(dgamma).add(dbeta).call(layer_norm_backward))
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
  if (Operands().add(wide, wide_rows).add(numbers).add(y).call(geglu_forward)) return INFINITY;
  if (Operands().add(wide, wide_rows).add(numbers).add(dy).add(dwide).call(geglu_backward)) return INFINITY;
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
  const int32_t position = 5;
  const std::vector<int32_t> first{position};
  if (Operands().add(wide, wide_rows).add(first).add(turns).add(dwide).call(rotary)) return INFINITY;
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
  const std::vector<int32_t> in_rows{1, position};  // the first row is still in its prefix
  turns[2] = prefix;
  const std::vector<int64_t> ring{batch * count, places, 2 * d};
  Operands enter;
  enter.add(qkv, {batch, 1, (more + 2 * count) * 2 * d}).add(keys, ring).add(values, ring);
  if (enter.add(first).add(in_rows).add(turns).add(q).call(enter_rings)) return INFINITY;
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
  const std::vector<int64_t> k_shape{batch, 1, n, 2 * d};
  const std::vector<int32_t> sizes(heads);
  Operands split, join;
  split.add(tokens, {batch, n, all * 2 * d}).add(sizes, {heads, 1}).add(turns);
  for (const auto &part : parts) split.add(part);
  join.add(parts[0], {batch, heads, n, 2 * d}).add(parts[1], k_shape).add(parts[2], k_shape).add(turns).add(joined);
  if (split.call(split_heads) || join.call(join_heads)) return INFINITY;
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
