// Products of a tile with its queries: a part of kernel.h.

struct Products : Block {
  using Block::Block;

  // to[j, lane] = from[j] . x_t[., lane], for rows of `width`
  void products(const float *from, int64_t width, const float *x_t, float *to) {
    if (count == 1) return products_with_one(from, width, x_t, to);
    for (int i = 0; i < pieces; ++i) {
      const Piece &p = piece[i];
      matmul(p.end_key - p.key, p.end_vector - p.vector, width, from + p.key * width, width, 1,
             x_t + p.vector * WIDTH, QUERIES,
             to + p.key * QUERIES + p.vector * WIDTH, QUERIES, false, ahead);
    }
  }

  // The same for one query, as in decoding. Here a vector holds numbers of one key instead of queries. The lanes of the
  // missing queries get the product of the one that exists.
  void products_with_one(const float *from, int64_t width, const float *x_t, float *to) {
    for (int64_t c = 0; c < width; ++c) one[c] = x_t[c * QUERIES];
    for (int i = 0; i < pieces; ++i)
      for (int j = piece[i].key, end = piece[i].end_key; j < end; j += WIDTH) {
        const int many = std::min(WIDTH, end - j);
        Vec total[WIDTH]{};
        for (int at = 0; at < many; ++at)
          for (int64_t c = 0; c < width; c += WIDTH)
            total[at] += take(from + (j + at) * width + c, width - c) * take(one + c, width - c);
        turn(total);
        for (int other = 1; other < WIDTH; ++other) total[0] += total[other];
        for (int at = 0; at < many; ++at) store(to + (j + at) * QUERIES, all(total[0][at]));
      }
  }

  void add_to_one(const float *weights, const float *from, const Width &width, float *to_t) {
    const int64_t numbers = width.d;
    for (int i = 0; i < pieces; ++i) {
      const int j = piece[i].key, seen = piece[i].end_key - j;
      if (numbers == width.padded) {
        matmul(1, numbers / WIDTH, seen, weights + j * QUERIES, 0, QUERIES, from + j * numbers, numbers, one, 0, false,
               ahead);
      } else {
        std::fill(one, one + numbers, 0.f);
        for (int at = j; at < j + seen; ++at)
          for (int64_t c = 0; c < numbers; ++c) one[c] += weights[at * QUERIES] * from[at * numbers + c];
      }
      for (int64_t c = 0; c < numbers; ++c) to_t[c * QUERIES] += one[c];
    }
  }

  // to_t[., lane] += the sum over keys of weights[j, lane] * from[j]
  void add_to_queries(const float *weights, const float *from, const Width &width, float *to_t) {
    if (count == 1 && !careful) return add_to_one(weights, from, width, to_t);
    for (int i = 0; i < pieces; ++i) {
      const Piece &p = piece[i];
      const int seen = p.end_key - p.key, lanes = (p.end_vector - p.vector) * WIDTH;
      const float *w = weights + p.key * QUERIES + p.vector * WIDTH;
      float *to = to_t + p.vector * WIDTH;
      if (careful)
        matmul_of_seen(seen, lanes, width.d, w, from + p.key * width.d, width.d, to, QUERIES, true);
      else
        matmul(width.d, lanes / WIDTH, seen, from + p.key * width.d, 1, width.d, w, QUERIES, to, QUERIES, true, ahead);
    }
  }

  // to[j] += the sum over queries of weights[j, lane] * from[lane]
  void add_to_keys(const float *weights, const float *from, const Width &width, float *to) {
    const int64_t numbers = width.d, stride = width.padded;
    for (int i = 0; i < pieces; ++i) {
      const Piece &p = piece[i];
      const int seen = p.end_key - p.key;
      const int64_t lane = p.vector * WIDTH, lanes = std::min<int64_t>(p.end_vector * WIDTH, count) - lane;
      const float *w = weights + p.key * QUERIES + lane;
      if (careful) {
        matmul_of_seen(seen, lanes, numbers, w, from + lane * stride, stride, to + p.key * numbers, numbers, false);
      } else if (numbers == stride) {
        matmul(seen, numbers / WIDTH, lanes, w, QUERIES, 1, from + lane * stride, stride, to + p.key * numbers, numbers,
               true, ahead);
      } else {
        matmul(seen, stride / WIDTH, lanes, w, QUERIES, 1, from + lane * stride, stride, one, stride, false, ahead);
        for (int64_t j = 0; j < seen; ++j)
          for (int64_t c = 0; c < numbers; ++c) to[(p.key + j) * numbers + c] += one[j * stride + c];
      }
    }
  }
};
