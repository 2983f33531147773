// The backward pass of a block of queries, from the statistics of the forward pass: a part of kernel.h.

struct Worker : Forward {
  using Forward::Forward;

  void backward(const Queries &block, const Queries &next, const Gradients &grads, Chunk &chunk) {
    const int64_t at = block.group * call.n_q + block.start;
    read_block(block, was_halved(grads.statistics + 2 * at, block.end - block.start));
    const int64_t bytes = call.q.bytes(), in_floats = sizeof(float);
    look_ahead(next, {{call.k.data, d * bytes}, {call.v.data, of_values.d * bytes}, {grads.dk, d * in_floats},
                      {grads.dv, of_values.d * in_floats}});
    for (const Numbers &x : {grads.dout, grads.out})
      ahead.add(x.at(call.out_place(next.group, next.start)), next.end - next.start, call.out_stride() * bytes,
                of_values.d * bytes);
    plan(grads.dq, group * call.n_q + start, count, d, d);
    ahead.begin(5 * parts());
    const int64_t out_at = call.out_place(group, start), stride = call.out_stride();
    const float *from_dout = read(grads.dout, out_at, stride, count, of_values.d, dout_floats);
    const float *from_out = read(grads.out, out_at, stride, count, of_values.d, out_floats);
    const int64_t out_stride = grads.out.type == Type::FLOAT32 ? stride : of_values.d;
    const int64_t end = call.prefix ? std::max<int64_t>(end_of_keys(), prefix_last[count - 1] + 1) : end_of_keys();
    clear_keys(call, grads, key_group, chunk.cleared, end);
    transpose(count, of_values.d, from_dout, out_stride, dout_t, QUERIES, 1.f);
    const float *dout_rows = in_vectors(from_dout, out_stride, of_values, dout);
    const float *asks = call.emb ? in_vectors(call.emb_q ? call.emb_q + at * d : q_rows, d, of_keys, q) : nullptr;
    copied(q_rows, d, of_keys, q_scaled, call.scale);
    const bool block_finite = finite(q_rows, count * d) && finite(dout_rows, count * of_values.padded);
    const bool emb_q_finite = call.emb && finite(asks, count * padded);
    for (int lane = 0; lane < vectors * WIDTH; ++lane) {
      const bool exists = lane < count;
      highest[lane] = exists ? grads.statistics[2 * (at + lane)] : INFINITY;
      sum[lane] = exists ? std::fabs(grads.statistics[2 * (at + lane) + 1]) : 0;
    }
    for (int v = 0; v < vectors; ++v) {
      Vec total[WIDTH]{};
      for (int i = 0; i < WIDTH; ++i) {
        const int64_t lane = std::min<int64_t>(v * WIDTH + i, count - 1);
        const float *x = from_dout + lane * out_stride, *y = from_out + lane * out_stride;
        int64_t c = 0;
        for (; c + WIDTH <= of_values.d; c += WIDTH) total[i] += load<Vec>(x + c) * load<Vec>(y + c);
        for (; c < of_values.d; ++c) total[i][0] += x[c] * y[c];
      }
      turn(total);
      for (int i = 1; i < WIDTH; ++i) total[0] += total[i];
      total[0] -= take(grads.dlse + at + v * WIDTH, count - v * WIDTH);
      store(dot + v * WIDTH, load<Vec>(sum + v * WIDTH) == 0.f ? Vec{} : total[0]);
    }
    if (call.sink_rows)
      sink_gradient(grads.dsinks + at);
    else if (call.sinks)
      grads.dsink_parts[group * divide_up(call.n_q, QUERIES) + start / QUERIES] = sink_gradient(nullptr);
    float *dq_t = out_t;
    std::fill(dq_t, dq_t + d * QUERIES, 0.f);
    if (call.emb) std::fill(dq_emb_t, dq_emb_t + d * QUERIES, 0.f);
    over_keys([&] {
      const bool hides = partial || call.bias;
      careful = hides && !(block_finite && finite(k_rows, keys * d));
      score();
      products(v_rows, of_values.d, dout_t, dscores);
      const float *relative_to = highest;
      if (halved()) relative_to = top, std::copy_n(highest, QUERIES, top), widen(top);
      const bool plain = !call.dropping && !call.hide_self && !hides;
      plain ? differentiate<true>(relative_to) : differentiate<false>(relative_to);
      for (int i = 0; call.bias && i < pieces; ++i)
        for (int v = piece[i].vector; v < piece[i].end_vector; ++v) add_to_bias(v, piece[i], chunk.dbias);
      if (call.emb) add_to_offsets(asks, chunk.demb, emb_q_finite);
      if (call.softcap > 0) uncap();
      float *dk = grads.dk + first_row() * d, *dv = grads.dv + first_row() * of_values.d;
      if (in_prefix && begun < chunk.position) {
        dk = chunk.dprefix + (key - begun) * d;
        dv = chunk.dprefix + call.prefix * d + (key - begun) * of_values.d;
      }
      add_to_keys(scores, dout_rows, of_values, dv);
      add_to_keys(dscores, q_scaled, of_keys, dk);
      add_to_queries(dscores, k_rows, of_keys, dq_t);
    });
    const bool added = call.emb && !grads.demb_q;  // whether embeddings add to the gradient of q itself
    for (int64_t x = 0; added && x < d * QUERIES; ++x) dq_t[x] = call.scale * dq_t[x] + dq_emb_t[x];
    write(dq_t, d, added ? 1 : call.scale, grads.dq, at * d, d);
    if (grads.demb_q) transpose(d, count, dq_emb_t, QUERIES, grads.demb_q + at * d, d, 1.f);
  }

  // Whether the forward pass halved scores: the inverses of its sums are then negative, or -0.
  static bool was_halved(const float *statistics, int64_t count) {
    for (int64_t row = 0; row < count; ++row)
      if (!std::isnan(statistics[2 * row + 1]) && std::signbit(statistics[2 * row + 1])) return true;
    return false;
  }

  // Returns the block's part of the gradient of the sink, and writes that of each query to `to_rows`, if it is given.
  // A sink acts as a key without a value.
  float sink_gradient(float *to_rows) {
    Vec total{};
    for (int lane = 0; lane < vectors * WIDTH; lane += WIDTH) {
      const Vec score = (load<Vec>(sinks + lane) - load<Vec>(highest + lane)) * (LOG2_E / unit);
      const Vec grad = power_of_2(score) * load<Vec>(sum + lane) * -load<Vec>(dot + lane);
      if (to_rows) put(to_rows + lane, count - lane, grad);
      total += grad;
    }
    return sum_of(total);
  }

  // Turns scores into weights, and gradients of weights into gradients of scores. PLAIN: every key is seen, nothing is
  // dropped, and no query hides itself. Otherwise an unseen key stays 0, whatever the other numbers are.
  template <bool PLAIN>
  void differentiate(const float *relative_to) {
    over_tile([&](auto many, int v, int from, int to) {
      Vec near[many], inverse[many], mean[many];
      for (int i = 0; i < many; ++i) {
        const int lane = (v + i) * WIDTH;
        near[i] = load<Vec>(relative_to + lane), inverse[i] = load<Vec>(sum + lane), mean[i] = load<Vec>(dot + lane);
      }
      for (int j = from; j < to; ++j)
        for (int i = 0; i < many; ++i) {
          const int64_t at = j * QUERIES + (v + i) * WIDTH;
          const Vec score = load<Vec>(scores + at), dweight = load<Vec>(dscores + at);
          Vec weight = power_of_2(score - near[i]) * inverse[i];
          if (PLAIN) {
            store(scores + at, weight);
            store(dscores + at, weight * (dweight - mean[i]));
            continue;
          }
          weight = score == -INFINITY ? Vec{} : weight;
          const Vec factor = call.dropping ? keep(v + i, key + j) : all(1);
          Vec dscore = weight == 0.f ? Vec{} : weight * (dweight * factor - mean[i]);
          if (call.hide_self) dscore = load<Ints>(positions + (v + i) * WIDTH) - (int32_t)key == j ? Vec{} : dscore;
          store(scores + at, weight * factor);
          store(dscores + at, dscore);
        }
    });
  }

  // Turns gradients of capped scores into gradients of products.
  void uncap() {
    over_tile([&](auto many, int v, int from, int to) {
      for (int j = from; j < to; ++j)
        for (int i = 0; i < many; ++i) {
          const int64_t at = j * QUERIES + (v + i) * WIDTH;
          const Vec dscore = load<Vec>(dscores + at);
          store(dscores + at, dscore == 0.f ? Vec{} : dscore * load<Vec>(slopes + at));
        }
    });
  }

  void add_to_bias(int v, const Piece &p, float *dbias) {
    for (int j = p.key; j < p.end_key; j += WIDTH) {
      Vec x[WIDTH]{};
      for (int i = 0; i < std::min(WIDTH, p.end_key - j); ++i)
        x[i] = load<Vec>(dscores + (j + i) * QUERIES + v * WIDTH);
      turn(x);
      for (int i = 0; i < std::min<int64_t>(WIDTH, count - v * WIDTH); ++i) {
        float *to = dbias + call.bias_place(group) + bias_rows[v * WIDTH + i];
        const int64_t column = column_of(v * WIDTH + i, j);
        __builtin_prefetch(to + real_column(column + KEYS), 1);
        if (all_real(column))
          store(to + column, load<Vec>(to + column) + x[i]);
        else
          for (int c = 0; c < WIDTH; ++c) to[real_column(column + c)] += x[i][c];
      }
    }
  }

  void add_to_offsets(const float *asks, float *demb, bool q_finite) {
    int64_t from, to;
    offsets_within(from, to);
    if (from >= to) return;
    std::fill(by_offset, by_offset + (KEYS + QUERIES) * QUERIES, 0.f);
    for (int i = 0; i < pieces; ++i) {
      const int64_t end = std::min<int64_t>(piece[i].end_vector * WIDTH, count);
      for (int j = piece[i].key; j < piece[i].end_key; ++j)
        for (int64_t lane = piece[i].vector * WIDTH; lane < end; ++lane)
          by_offset[(j + QUERIES - 1 - lane) * QUERIES + lane] = dscores[j * QUERIES + lane];
    }
    const int64_t used = to - from;
    const float *by = by_offset + from * QUERIES, *emb = call.emb + offset_of(from) * d;
    float *to_emb = demb + offset_of(from) * padded;
    if (finite(emb, used * d))
      matmul(d, vectors, used, emb, 1, d, by, QUERIES, dq_emb_t, QUERIES, true, ahead);
    else
      matmul_of_seen(used, vectors * WIDTH, d, by, emb, d, dq_emb_t, QUERIES, true);
    if (q_finite)
      matmul(used, padded / WIDTH, count, by, QUERIES, 1, asks, padded, to_emb, padded, true, ahead);
    else
      matmul_of_seen(used, count, padded, by, asks, padded, to_emb, padded, false);
  }
};
