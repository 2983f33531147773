// The scores of a tile: a part of kernel.h.

struct Scores : Products {
  using Products::Products;

  // Computes the scores of the tile: products, scaled and capped, plus embeddings and bias. What is not seen, or hidden
  // by the bias, gets -inf.
  void score() {
    products(k_rows, d, q_t, scores);
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
    const float *bias = call.bias + call.bias_place(group);
    for (int j = p.key; j < p.end_key; j += WIDTH) {
      Vec x[WIDTH];
      for (int i = 0; i < WIDTH; ++i) {
        const float *of = bias + bias_rows[v * WIDTH + i];
        const int64_t column = column_of(v * WIDTH + i, j);
        x[i] = bias_of(of, column);
        __builtin_prefetch(of + real_column(column + KEYS));  // rows are pages apart: no processor prefetches them
      }
      turn(x);
      for (int i = 0; i < std::min(WIDTH, p.end_key - j); ++i) {
        float *at = scores + (j + i) * QUERIES + v * WIDTH;
        store(at, x[i] < HIDES ? all(-INFINITY) : load<Vec>(at) + x[i] * unit);
      }
    }
  }

  void hide_self(int v, const Piece &p) {
    const Ints itself = load<Ints>(positions + v * WIDTH) - (int32_t)key;
    for (int j = p.key; j < p.end_key; ++j) {
      float *at = scores + j * QUERIES + v * WIDTH;
      const Vec score = load<Vec>(at);
      store(at, ((itself == j) & (score > -INFINITY)) ? all(SELF_SCORE * unit) : score);
    }
  }

  // Whether a vector of queries sees every key of a piece.
  bool whole(int v, const Piece &p) const {
    return !real && !in_prefix && first[(v + 1) * WIDTH - 1] <= key + p.key &&
           key + p.end_key <= last[v * WIDTH] + 1 && !(ordered && p.most > lowest_own[v]);
  }

  void hide_unseen(int v, const Piece &p) {
    const int32_t tile = key;
    const Ints low = load<Ints>(first + v * WIDTH) - tile, high = load<Ints>(last + v * WIDTH) - tile;
    const Ints number = ordered ? load<Ints>(own + v * WIDTH) : Ints{};
    const Ints from = load<Ints>(document + v * WIDTH) - tile, to = load<Ints>(prefix_last + v * WIDTH) - tile;
    for (int j = p.key; j < p.end_key; ++j) {
      float *at = scores + j * QUERIES + v * WIDTH;
      Ints seen = (low <= j) & (high >= j);
      if (in_prefix) seen = ~seen & (from <= j) & (to >= j);
      if (ordered) seen &= number >= order[key + j];
      store(at, real && !real[key + j] ? all(-INFINITY) : seen ? load<Vec>(at) : all(-INFINITY));
    }
  }

  // The embeddings for the pairs of query and key in this tile: by_offset[x] belongs to embedding offset_of(0) + x.
  int64_t offset_of(int64_t x) const {
    return key - (call.offset + start + QUERIES - 1) + call.bias_backward + x;
  }

  void offsets_within(int64_t &from, int64_t &to) const {
    const int64_t most = keys + QUERIES - 1;
    from = std::clamp<int64_t>(-offset_of(0), 0, most), to = std::clamp(call.offsets - offset_of(0), from, most);
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

  INLINE Vec bias_of(const float *of, int64_t column) const {
    if (all_real(column)) return load<Vec>(of + column);
    float edge[WIDTH];
    for (int i = 0; i < WIDTH; ++i) edge[i] = of[real_column(column + i)];
    return load<Vec>(edge);
  }

  INLINE Vec keep(int v, int64_t j) {
    const Ints mixed = (Ints)scramble(load<Bits>(hashes + v * WIDTH) ^ (Bits{} + column_hash(call.first_position + j)));
    return mixed >= call.drop_below ? all(call.kept_factor) : Vec{};
  }
};
