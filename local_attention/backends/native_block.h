// A block of queries, its tiles of keys, one after the other, and their scores: a part of native_kernel.h.

constexpr float HIDES = -1e29f;  // a bias below it hides its key
constexpr int KEYS = 64;   // in a tile
constexpr int PIECE = 16;  // keys in a piece: a tile that some queries do not see whole is divided into these

// Keys key ... end_key - 1 of a tile, and the vectors of queries, vector ... end_vector - 1, that see any of them.
struct Piece {
  int key, end_key, vector, end_vector;
};

// The memory of one thread, its present block of queries, and its present tile of keys.
struct Block {
  const Call &call;
  const int64_t d, padded;
  std::unique_ptr<float[]> memory;
  float *q_t, *q_emb_t, *out_t, *scores, *slopes, *q, *q_scaled, *dout, *dout_t, *dscores, *dq_emb_t, *row, *by_offset;

  int64_t group, key_group, start, count;  // the block: queries start ... start + count - 1 of a group
  int vectors;
  // For each query: its position, the first and the last key of its span, the first key of its document, where its
  // prefix begins, and the last key of that prefix. None of these decreases from one query to the next.
  int32_t positions[QUERIES], first[QUERIES], last[QUERIES], document[QUERIES]{}, prefix_last[QUERIES]{};
  int64_t bias_rows[QUERIES], columns_from[QUERIES];  // each query's row of the bias, and the key of its column 0
  uint32_t rows[QUERIES];                             // each query's hash for dropout
  float highest[QUERIES], top[QUERIES], sum[QUERIES], dot[QUERIES];
  const bool *real;  // which keys are real; null if all are
  float unit = LOG2_E;  // scores are in units of log(2), or twice that where they would overflow in these

  int64_t key;  // the tile: keys key ... key + keys - 1
  int keys, pieces;
  int64_t begun;  // if the tile is of a prefix: where its document begins
  // Whether the tile is of a prefix, whether some of it is unseen, and whether products of what is unseen are skipped.
  bool in_prefix, partial, careful;
  Piece piece[KEYS / PIECE];
  Ahead ahead;

  explicit Block(const Call &call) : call(call), d(call.head_dim), padded(call.padded) {
    const int64_t down = d * QUERIES, wide = QUERIES * padded, tile = KEYS * QUERIES;
    float **parts[] = {&q_t, &q_emb_t, &out_t, &dout_t, &dq_emb_t, &q, &q_scaled, &dout, &row, &scores, &dscores,
                       &slopes, &by_offset};
    const int64_t sizes[] = {down, call.emb ? down : 0, down, down, down, wide, wide, wide, KEYS * padded, tile,
                             tile, call.softcap > 0 ? tile : 0, call.emb ? (KEYS + QUERIES) * QUERIES : 0};
    int64_t total = WIDTH;
    for (int64_t size : sizes) total += size;
    memory.reset(new float[total]);  // memory that is never touched costs nothing
    float *next = memory.get() + (-(uintptr_t)memory.get() / 4) % WIDTH;  // aligned to a vector
    for (int i = 0; i < 13; ++i) *parts[i] = next, next += sizes[i];
    for (float *rows : {q, q_scaled, dout})
      if (d < padded) std::fill(rows, rows + wide, 0.f);
    ahead.width = d;
  }

  bool halved() const { return unit < LOG2_E; }

  // Reads a block of queries whose scores are to be `halved` or not.
  void read_block(const Queries &block, bool halved) {
    unit = halved ? LOG2_E / 2 : LOG2_E;
    group = block.group, key_group = group / call.share, start = block.start, count = block.end - start;
    vectors = (count + WIDTH - 1) / WIDTH;
    const float *from_q = call.q + (group * call.n_q + start) * d;
    for (int64_t x = 0; x < count * d; x += CACHE_LINE) __builtin_prefetch(from_q + x);
    real = call.mask ? call.mask + group / (call.groups / call.batch) * call.n_k : nullptr;
    const int32_t *const bounds = call.documents_of(group);
    for (int lane = 0; lane < vectors * WIDTH; ++lane) {
      const int64_t position = call.offset + start + std::min<int64_t>(lane, count - 1);
      const Span within = call.document(bounds, position);
      const auto after = [&](int64_t size) {  // how far after the start of its bucket, or of its period
        const uint32_t place = position - within.first;
        return size == 1 ? 0 : place < size ? place : place % (uint32_t)size;
      };
      const Span span = call.span(position, position - after(call.bucket), within);
      positions[lane] = position, first[lane] = span.first, last[lane] = span.last;
      if (call.prefix) document[lane] = within.first, prefix_last[lane] = call.prefix_last(position, within);
      if (call.bias) {
        const int64_t row = after(call.period);
        bias_rows[lane] = row * call.columns, columns_from[lane] = position - row - call.bias_backward;
      }
      if (call.dropping) rows[lane] = row_hash(call.first_group + group, call.first_position + position);
    }
    transpose(count, d, from_q, d, q_t, QUERIES, call.softcap > 0 ? call.scale / call.softcap : call.scale * unit);
    if (call.emb) transpose(count, d, from_q, d, q_emb_t, QUERIES, unit);
    if (call.dropping)
      for (int v = 0; v < vectors; ++v)
        store(rows + v * WIDTH, scramble(load<Bits>(rows + v * WIDTH) ^ (Bits{} + call.seed)));
  }

  // Plans to fetch what the next block needs and this one does not: its queries, and rows of these tensors of keys.
  void look_ahead(const Queries &next, std::initializer_list<const float *> tensors) {
    const int64_t next_group = next.group / call.share, position = call.offset + next.start;
    const Span within = call.document(call.documents_of(next.group), position);
    int64_t from = call.span(position, position + 1 - call.bucket, within).first;  // that it may see
    if (next_group == key_group) from = std::max(from, end_of_keys());
    const int64_t end = std::min(end_of_keys() + next.start - start, call.n_k);  // if it sees as far as this block does
    ahead.left = 0;
    for (const float *x : tensors)
      ahead.add(x + (next_group * call.n_k + from) * d, std::min<int64_t>(end - from, 4 * KEYS), d);
    ahead.add(call.q + (next.group * call.n_q + next.start) * d, next.end - next.start, d);
  }

  // About how many parts a product of the block with all of its keys has: see `matmul`.
  int64_t parts() const { return (end_of_keys() - first_key()) / 4; }

  const float *copied(const float *from, int64_t stride, float *to, float factor) {
    for (int64_t lane = 0; lane < count; ++lane)
      for (int64_t c = 0; c < d; ++c) to[lane * padded + c] = factor * from[lane * stride + c];
    return to;
  }

  // Returns rows of whole vectors, one after the other: the given rows if they are such, else a copy.
  const float *in_vectors(const float *from, int64_t stride, float *to) {
    return d == padded && stride == d ? from : copied(from, stride, to, 1);
  }

  int64_t first_key() const { return first[0]; }
  int64_t end_of_keys() const { return last[count - 1] + 1; }
  int64_t first_row() const { return key_group * call.n_k + key; }
  const float *k_rows() const { return call.k + first_row() * d; }
  const float *v_rows() const { return call.v + first_row() * d; }
  int count_real() const { return real ? std::count(real + key, real + key + keys, true) : keys; }

  // Acts on one tile after the other: those of the prefix of each document in the block, then those of the spans.
  template <typename Act>
  INLINE void over_keys(Act &&act) {
    for (int lane = 0, end = 1; call.prefix && lane < count; lane = end++) {
      while (end < count && document[end] == document[lane]) ++end;
      for (int64_t tile = document[lane]; tile <= prefix_last[end - 1]; tile += KEYS)
        if (read_prefix(tile, lane, end)) act();
    }
    // Tiles are counted from the diagonal, so that as few as possible are across it.
    const int64_t diagonal = last[0] + (last[0] == last[count - 1]);
    int64_t tile = first_key(), next = tile + (tile < diagonal ? (diagonal - tile - 1) % KEYS + 1 : KEYS);
    for (; tile < end_of_keys(); tile = next, next += KEYS)
      if (read_tile(tile, next)) act();
  }

  // Reads the tile that begins at a key of the prefix of queries lane ... end - 1. Returns false if it has nothing to
  // add: either every key that they see of it is in their spans too, or no key is real.
  bool read_prefix(int64_t from, int lane, int end) {
    in_prefix = partial = true, begun = document[lane], key = from;
    keys = std::min<int64_t>(KEYS, prefix_last[end - 1] + 1 - from);
    const auto sees_more = [&](int query) {
      const int64_t to = std::min<int64_t>(prefix_last[query], key + keys - 1);
      return key <= to && (key < first[query] || last[query] < to);
    };
    while (lane < end && !sees_more(lane)) ++lane;
    while (lane < end && !sees_more(end - 1)) --end;
    piece[0] = {0, keys, lane / WIDTH, (end + WIDTH - 1) / WIDTH}, pieces = 1;
    return lane < end && count_real();
  }

  // Reads the tile of spans with keys from ... to - 1, as far as there are any. Returns false if none is real.
  bool read_tile(int64_t from, int64_t to) {
    in_prefix = false, key = from, keys = std::min<int64_t>(to, end_of_keys()) - from;
    const int real_keys = count_real();
    const bool spanned = first[count - 1] <= key && key + keys <= last[0] + 1;
    partial = !spanned || real_keys < keys;
    pieces = 0;
    if (spanned) piece[pieces++] = {0, keys, 0, vectors};
    for (int j = 0; !spanned && j < keys; j += PIECE) {
      Piece next{j, std::min(j + PIECE, keys), 0, vectors};
      int &vector = next.vector, &end = next.end_vector;
      while (vector < end && last[std::min<int64_t>((vector + 1) * WIDTH, count) - 1] < key + j) ++vector;
      while (end > vector && first[(end - 1) * WIDTH] >= key + next.end_key) --end;
      if (vector == end) continue;
      Piece *const before = pieces ? &piece[pieces - 1] : nullptr;
      if (before && before->end_key == j && before->vector == vector && before->end_vector == end)
        before->end_key = next.end_key;
      else
        piece[pieces++] = next;
    }
    return real_keys;
  }

  // Acts on the pieces of the tile that are seen, on as many vectors of queries at once as the registers hold.
  template <typename Act>
  INLINE void over_tile(Act &&act) {
    for (int i = 0; i < pieces; ++i) {
      const Piece p = piece[i];
      across(p.vector, p.end_vector, [&](auto count, int v) { act(count, v, p.key, p.end_key); });
    }
  }

  // to[j, lane] = from[j] . x_t[., lane]
  void products(const float *from, const float *x_t, float *to) {
    if (count == 1) return products_with_one(from, x_t, to);
    for (int i = 0; i < pieces; ++i) {
      const Piece &p = piece[i];
      matmul(p.end_key - p.key, p.end_vector - p.vector, d, from + p.key * d, d, 1, x_t + p.vector * WIDTH, QUERIES,
             to + p.key * QUERIES + p.vector * WIDTH, QUERIES, false, ahead);
    }
  }

  // Whether a query sees a real key.
  bool sees(int64_t lane) const {
    const auto any = [&](int64_t from, int64_t to) {
      return from <= to && (!real || std::count(real + from, real + to + 1, true));
    };
    return any(first[lane], last[lane]) || (call.prefix && any(document[lane], prefix_last[lane]));
  }

  // The same for one query, as in decoding. Here a vector holds numbers of one key instead of queries. The lanes of the
  // missing queries get the product of the one that exists.
  void products_with_one(const float *from, const float *x_t, float *to) {
    for (int64_t c = 0; c < d; ++c) row[c] = x_t[c * QUERIES];
    for (int i = 0; i < pieces; ++i)
      for (int j = piece[i].key, end = piece[i].end_key; j < end; j += WIDTH) {
        const int rows = std::min(WIDTH, end - j);
        Vec total[WIDTH]{};
        for (int key = 0; key < rows; ++key)
          for (int64_t c = 0; c < d; c += WIDTH)
            total[key] += take(from + (j + key) * d + c, d - c) * take(row + c, d - c);
        turn(total);
        for (int other = 1; other < WIDTH; ++other) total[0] += total[other];
        for (int key = 0; key < rows; ++key) store(to + (j + key) * QUERIES, all(total[0][key]));
      }
  }

  void add_to_one(const float *weights, const float *from, float *to_t) {
    for (int i = 0; i < pieces; ++i) {
      const int j = piece[i].key, seen = piece[i].end_key - j;
      if (d == padded) {
        matmul(1, d / WIDTH, seen, weights + j * QUERIES, 0, QUERIES, from + j * d, d, row, 0, false, ahead);
      } else {
        std::fill(row, row + d, 0.f);
        for (int key = j; key < j + seen; ++key)
          for (int64_t c = 0; c < d; ++c) row[c] += weights[key * QUERIES] * from[key * d + c];
      }
      for (int64_t c = 0; c < d; ++c) to_t[c * QUERIES] += row[c];
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
        matmul(seen, padded / WIDTH, lanes, w, QUERIES, 1, from + lane * padded, padded, row, padded, false, ahead);
        for (int64_t j = 0; j < seen; ++j)
          for (int64_t c = 0; c < d; ++c) to[(p.key + j) * d + c] += row[j * padded + c];
      }
    }
  }

  // Computes the scores of the tile: products, scaled and capped, plus embeddings and bias. What is not seen, or hidden
  // by the bias, gets -inf.
  void score() {
    products(k_rows(), q_t, scores);
    if (call.emb) score_offsets();
    for (int i = 0; i < pieces; ++i)
      for (int v = piece[i].vector; v < piece[i].end_vector; ++v) {
        if (call.softcap > 0) cap(v, piece[i]);
        if (call.emb) add_embeddings(v, piece[i]);
        if (call.bias) add_bias(v, piece[i]);
        if (call.hide_self) hide_self(v, piece[i]);
        if (partial && !whole(v, piece[i])) hide_unseen(v, piece[i]);
      }
  }

  void cap(int v, const Piece &p) {
    for (int j = p.key; j < p.end_key; ++j) {
      const int64_t at = j * QUERIES + v * WIDTH;
      const Vec capped = tanh(load<Vec>(scores + at));
      store(scores + at, capped * (call.softcap * unit));
      store(slopes + at, 1.f - capped * capped);
    }
  }

  void add_embeddings(int v, const Piece &p) {
    for (int j = p.key; j < p.end_key; ++j) {
      float *at = scores + j * QUERIES + v * WIDTH;
      Vec x;
      for (int lane = 0; lane < WIDTH; ++lane)
        x[lane] = by_offset[(j + QUERIES - 1 - v * WIDTH - lane) * QUERIES + v * WIDTH + lane];
      store(at, load<Vec>(at) + x);
    }
  }

  void add_bias(int v, const Piece &p) {
    const float *bias = call.bias + group % call.heads * call.bias_size;
    for (int j = p.key; j < p.end_key; j += WIDTH) {
      Vec x[WIDTH];
      for (int i = 0; i < WIDTH; ++i) {
        const float *row = bias + bias_rows[v * WIDTH + i];
        const int64_t column = column_of(v * WIDTH + i, j);
        x[i] = bias_of(row, column);
        __builtin_prefetch(row + real_column(column + KEYS));  // rows are pages apart: no processor prefetches them
      }
      turn(x);
      for (int i = 0; i < std::min(WIDTH, p.end_key - j); ++i) {
        float *at = scores + (j + i) * QUERIES + v * WIDTH;
        store(at, x[i] < HIDES ? all(-INFINITY) : load<Vec>(at) + x[i] * unit);
      }
    }
  }

  void hide_self(int v, const Piece &p) {
    const Ints own = load<Ints>(positions + v * WIDTH) - (int32_t)key;
    for (int j = p.key; j < p.end_key; ++j) {
      float *at = scores + j * QUERIES + v * WIDTH;
      const Vec score = load<Vec>(at);
      store(at, (own == j) & (score > -INFINITY) ? all(SELF_SCORE * unit) : score);
    }
  }

  // Whether a vector of queries sees every key of a piece.
  bool whole(int v, const Piece &p) const {
    return !real && !in_prefix && first[(v + 1) * WIDTH - 1] <= key + p.key && key + p.end_key <= last[v * WIDTH] + 1;
  }

  void hide_unseen(int v, const Piece &p) {
    const int32_t tile = key;
    const Ints low = load<Ints>(first + v * WIDTH) - tile, high = load<Ints>(last + v * WIDTH) - tile;
    const Ints from = load<Ints>(document + v * WIDTH) - tile, to = load<Ints>(prefix_last + v * WIDTH) - tile;
    for (int j = p.key; j < p.end_key; ++j) {
      float *at = scores + j * QUERIES + v * WIDTH;
      Ints seen = (low <= j) & (high >= j);
      if (in_prefix) seen = ~seen & (from <= j) & (to >= j);
      store(at, real && !real[key + j] ? all(-INFINITY) : seen ? load<Vec>(at) : all(-INFINITY));
    }
  }

  // The embeddings for the pairs of query and key in this tile: by_offset[x] belongs to embedding offset_of(0) + x.
  int64_t offset_of(int64_t x) const {
    return key - (call.offset + start + QUERIES - 1) + call.bias_backward + x;
  }

  void offsets_within(int64_t &from, int64_t &to) const {
    const int64_t rows = keys + QUERIES - 1;
    from = std::clamp<int64_t>(-offset_of(0), 0, rows), to = std::clamp(call.offsets - offset_of(0), from, rows);
  }

  // Multiplies queries by embeddings. Offsets without an embedding get 0: a lane without a query would otherwise read
  // an old number there, and a high score in one lane makes `move` act on the whole vector.
  void score_offsets() {
    int64_t from, to;
    offsets_within(from, to);
    std::fill(by_offset, by_offset + from * QUERIES, 0.f);
    std::fill(by_offset + to * QUERIES, by_offset + (KEYS + QUERIES) * QUERIES, 0.f);
    if (from < to)
      matmul(to - from, vectors, d, call.emb + offset_of(from) * d, d, 1, q_emb_t, QUERIES, by_offset + from * QUERIES,
             QUERIES, false, ahead);
  }

  // The column for a key of the tile in a query's row of the bias. Beyond the outermost columns, those are used.
  int64_t column_of(int64_t lane, int j) const { return key + j - columns_from[lane]; }
  int64_t real_column(int64_t column) const { return std::min(std::max<int64_t>(column, 0), call.columns - 1); }
  bool all_real(int64_t column) const { return column >= 0 && column + WIDTH <= call.columns; }

  INLINE Vec bias_of(const float *row, int64_t column) const {
    if (all_real(column)) return load<Vec>(row + column);
    float edge[WIDTH];
    for (int i = 0; i < WIDTH; ++i) edge[i] = row[real_column(column + i)];
    return load<Vec>(edge);
  }

  INLINE Vec keep(int v, int64_t j) {
    const Ints mixed = (Ints)scramble(load<Bits>(rows + v * WIDTH) ^ (Bits{} + column_hash(call.first_position + j)));
    return mixed >= call.drop_below ? all(call.kept_factor) : Vec{};
  }
};
