// Products of a tile with its queries: a part of kernel.h.

struct Products : Block {
  using Block::Block;

  // to[j, lane] = from[j] . x_t[., lane]
  void products(const float *from, const float *x_t, float *to) {
    if (count == 1) return products_with_one(from, x_t, to);
    for (int i = 0; i < pieces; ++i) {
      const Piece &p = piece[i];
      matmul(p.end_key - p.key, p.end_vector - p.vector, d, from + p.key * d, d, 1, x_t + p.vector * WIDTH, QUERIES,
             to + p.key * QUERIES + p.vector * WIDTH, QUERIES, false, ahead);
    }
  }

  // The same for one query, as in decoding. Here a vector holds numbers of one key instead of queries. The lanes of the
  // missing queries get the product of the one that exists.
  void products_with_one(const float *from, const float *x_t, float *to) {
    for (int64_t c = 0; c < d; ++c) one[c] = x_t[c * QUERIES];
    for (int i = 0; i < pieces; ++i)
      for (int j = piece[i].key, end = piece[i].end_key; j < end; j += WIDTH) {
        const int many = std::min(WIDTH, end - j);
        Vec total[WIDTH]{};
        for (int at = 0; at < many; ++at)
          for (int64_t c = 0; c < d; c += WIDTH)
            total[at] += take(from + (j + at) * d + c, d - c) * take(one + c, d - c);
        turn(total);
        for (int other = 1; other < WIDTH; ++other) total[0] += total[other];
        for (int at = 0; at < many; ++at) store(to + (j + at) * QUERIES, all(total[0][at]));
      }
  }

  void add_to_one(const float *weights, const float *from, float *to_t) {
    for (int i = 0; i < pieces; ++i) {
      const int j = piece[i].key, seen = piece[i].end_key - j;
      if (d == padded) {
        matmul(1, d / WIDTH, seen, weights + j * QUERIES, 0, QUERIES, from + j * d, d, one, 0, false, ahead);
      } else {
        std::fill(one, one + d, 0.f);
        for (int at = j; at < j + seen; ++at)
          for (int64_t c = 0; c < d; ++c) one[c] += weights[at * QUERIES] * from[at * d + c];
      }
      for (int64_t c = 0; c < d; ++c) to_t[c * QUERIES] += one[c];
    }
  }

  // to_t[., lane] += the sum over keys of weights[j, lane] * from[j]
  void add_to_queries(const float *weights, const float *from, float *to_t) {
    if (count == 1 && !careful) return add_to_one(weights, from, to_t);
    for (int i = 0; i < pieces; ++i) {
      const Piece &p = piece[i];
      const int seen = p.end_key - p.key, lanes = (p.end_vector - p.vector) * WIDTH;
      const float *w = weights + p.key * QUERIES + p.vector * WIDTH;
      float *to = to_t + p.vector * WIDTH;
      if (careful)
        matmul_of_seen(seen, lanes, d, w, from + p.key * d, d, to, QUERIES, true);
      else
        matmul(d, lanes / WIDTH, seen, from + p.key * d, 1, d, w, QUERIES, to, QUERIES, true, ahead);
    }
  }

  // to[j] += the sum over queries of weights[j, lane] * from[lane]
  void add_to_keys(const float *weights, const float *from, float *to) {
    for (int i = 0; i < pieces; ++i) {
      const Piece &p = piece[i];
      const int seen = p.end_key - p.key;
      const int64_t lane = p.vector * WIDTH, lanes = std::min<int64_t>(p.end_vector * WIDTH, count) - lane;
      const float *w = weights + p.key * QUERIES + lane;
      if (careful) {
        matmul_of_seen(seen, lanes, d, w, from + lane * padded, padded, to + p.key * d, d, false);
      } else if (d == padded) {
        matmul(seen, d / WIDTH, lanes, w, QUERIES, 1, from + lane * padded, padded, to + p.key * d, d, true, ahead);
      } else {
        matmul(seen, padded / WIDTH, lanes, w, QUERIES, 1, from + lane * padded, padded, one, padded, false, ahead);
        for (int64_t j = 0; j < seen; ++j)
          for (int64_t c = 0; c < d; ++c) to[(p.key + j) * d + c] += one[j * padded + c];
      }
    }
  }
};
