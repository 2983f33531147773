// The forward pass of a block of queries: a part of kernel.h.

constexpr float SLACK = 8;  // see soften()

struct Forward : Scores {
  using Scores::Scores;

  void forward(const Queries &block, const Queries &next, const Outputs &outputs) {
    read_block(block, false);
    look_ahead(next, {{call.k.data, d * call.k.bytes()}, {call.v.data, of_values.d * call.v.bytes()}});
    ahead.add(outputs.out.at(call.out_place(group, start)), count, call.out_stride() * outputs.out.bytes(),
              of_values.d * outputs.out.bytes());
    ahead.begin(2 * parts());
    careful = false;
    attend();
    if (!finite(out_t, of_values.d * QUERIES)) careful = true, attend();  // 0 times a NaN of an unseen key may be in it
    if (overflown()) read_block(block, true), attend();
    const int64_t at = group * call.n_q + start;
    for (int64_t lane = 0; lane < count; lane += WIDTH) {
      const Vec near = load<Vec>(highest + lane) * (LOG_2 * (LOG2_E / unit));
      put(outputs.lse + at + lane, count - lane, near + log(load<Vec>(sum + lane)));
    }
    for (int64_t lane = 0; lane < vectors * WIDTH; ++lane) sum[lane] = sum[lane] == 0 ? 0 : 1 / sum[lane];
    write(out_t, of_values.d, (const float *)sum, outputs.out, call.out_place(group, start), call.out_stride());
    for (int64_t lane = 0; lane < count; ++lane) {
      outputs.statistics[2 * (at + lane)] = highest[lane] == -INFINITY ? 0 : highest[lane];
      outputs.statistics[2 * (at + lane) + 1] = halved() ? -sum[lane] : sum[lane];
    }
  }

  // Whether scores left the range of float32 upwards, or all that a query sees did so downwards. Where they are
  // infinite in any unit, nothing is lost.
  bool overflown() const {
    for (int64_t lane = 0; lane < count; ++lane) {
      if (highest[lane] == INFINITY || std::isnan(sum[lane])) return true;
      if (sum[lane] == 0 && (sinks[lane] > -INFINITY || sees(lane))) return true;
    }
    return false;
  }

  // Computes the weighted sums of values, and the sums of weights.
  void attend() {
    std::fill(out_t, out_t + of_values.d * QUERIES, 0.f);
    std::copy_n(sinks, QUERIES, highest);
    for (int lane = 0; lane < QUERIES; ++lane) sum[lane] = sinks[lane] == -INFINITY ? 0.f : 1.f;
    over_keys([&] {
      score();
      call.dropping ? soften<true>() : soften<false>();
      add_to_queries(scores, v_rows, of_values, out_t);
    });
  }

  // Turns scores into weights, relative to a score near the highest so far of each query. Where a new score is higher
  // by more than SLACK, a factor of 2^SLACK in the weight, it takes that place, and the earlier sums are rescaled.
  template <bool DROPPING>
  void soften() {
    std::copy_n(highest, QUERIES, top);
    over_tile([&](auto many, int v, int from, int to) {
      Vec now[many];
      for (int i = 0; i < many; ++i) now[i] = load<Vec>(top + (v + i) * WIDTH);
      for (int j = from; j < to; ++j)
        for (int i = 0; i < many; ++i) now[i] = max(now[i], load<Vec>(scores + j * QUERIES + (v + i) * WIDTH));
      for (int i = 0; i < many; ++i) store(top + (v + i) * WIDTH, now[i]);
    });
    for (int v = 0; v < vectors; ++v) move(v);
    if (halved()) widen(top);
    over_tile([&](auto many, int v, int from, int to) {
      Vec near[many], total[many]{};  // summing each tile by itself loses less than one long sum
      for (int i = 0; i < many; ++i) near[i] = load<Vec>(top + (v + i) * WIDTH);
      for (int j = from; j < to; ++j)
        for (int i = 0; i < many; ++i) {
          float *at = scores + j * QUERIES + (v + i) * WIDTH;
          Vec weight = power_of_2(load<Vec>(at) - near[i]);
          total[i] += weight;
          if (DROPPING) weight *= keep(v + i, key + j);
          store(at, weight);
        }
      for (int i = 0; i < many; ++i) {
        float *summed = sum + (v + i) * WIDTH;
        store(summed, load<Vec>(summed) + total[i]);
      }
    });
  }

  // Subtracts from halved scores what they are relative to, and doubles what is left: not halved, and relative to 0.
  void widen(float *relative_to) {
    for (int i = 0; i < pieces; ++i)
      for (int j = piece[i].key; j < piece[i].end_key; ++j)
        for (int lane = piece[i].vector * WIDTH; lane < piece[i].end_vector * WIDTH; ++lane)
          scores[j * QUERIES + lane] = 2 * (scores[j * QUERIES + lane] - relative_to[lane]);
    std::fill(relative_to, relative_to + QUERIES, 0.f);
  }

  // Replaces the highest scores of a vector of queries, in `top`, by those that the weights are relative to.
  void move(int v) {
    const Vec before = load<Vec>(highest + v * WIDTH), now = load<Vec>(top + v * WIDTH);
    const bool moves = any(now > before + SLACK);
    const Vec near = moves ? now : before, relative_to = near == -INFINITY ? Vec{} : near;
    store(top + v * WIDTH, relative_to);
    if (!moves) return;
    const Vec rescale = power_of_2((before - relative_to) * (LOG2_E / unit));
    store(highest + v * WIDTH, near);
    store(sum + v * WIDTH, load<Vec>(sum + v * WIDTH) * rescale);
    scale_out(v, rescale);
  }

  void scale_out(int v, Vec factor) {
    float *at = out_t + v * WIDTH;
    for (float *end = at + of_values.d * QUERIES; at < end; at += QUERIES) store(at, load<Vec>(at) * factor);
  }
};
