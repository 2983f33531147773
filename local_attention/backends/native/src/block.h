// A block of queries and its tiles of keys, one after the other: a part of kernel.h.

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
  float *q_t, *q_emb_t, *out_t, *scores, *slopes, *q, *q_scaled, *dout, *dout_t, *dscores, *dq_emb_t, *one, *by_offset;

  int64_t group, key_group, start, count;  // the block: queries start ... start + count - 1 of a group
  int vectors;
  // For each query: its position, the first and the last key of its span, the first key of its document, where its
  // prefix begins, and the last key of that prefix. None of these decreases from one query to the next.
  int32_t positions[QUERIES], first[QUERIES], last[QUERIES], document[QUERIES]{}, prefix_last[QUERIES]{};
  int64_t bias_rows[QUERIES], columns_from[QUERIES];  // each query's row of the bias, and the key of its column 0
  uint32_t hashes[QUERIES];                            // each query's hash for dropout
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

  explicit Block(const Call &c) : call(c), d(c.head_dim), padded(c.padded) {
    const int64_t down = d * QUERIES, wide = QUERIES * padded, tile = KEYS * QUERIES;
    float **parts[] = {&q_t, &q_emb_t, &out_t, &dout_t, &dq_emb_t, &q, &q_scaled, &dout, &one, &scores, &dscores,
                       &slopes, &by_offset};
    const int64_t sizes[] = {down, call.emb ? down : 0, down, down, down, wide, wide, wide, KEYS * padded, tile,
                             tile, call.softcap > 0 ? tile : 0, call.emb ? (KEYS + QUERIES) * QUERIES : 0};
    int64_t total = WIDTH;
    for (int64_t size : sizes) total += size;
    memory.reset(new float[total]);  // memory that is never touched costs nothing
    float *next = memory.get() + (-(uintptr_t)memory.get() / 4) % WIDTH;  // aligned to a vector
    for (int i = 0; i < 13; ++i) *parts[i] = next, next += sizes[i];
    for (float *of : {q, q_scaled, dout})
      if (d < padded) std::fill(of, of + wide, 0.f);
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
        const int64_t in_period = after(call.period);
        bias_rows[lane] = in_period * call.columns;
        columns_from[lane] = position - in_period - call.bias_backward;
      }
      if (call.dropping) hashes[lane] = row_hash(call.first_group + group, call.first_position + position);
    }
    transpose(count, d, from_q, d, q_t, QUERIES, call.softcap > 0 ? call.scale / call.softcap : call.scale * unit);
    if (call.emb) transpose(count, d, from_q, d, q_emb_t, QUERIES, unit);
    if (call.dropping)
      for (int v = 0; v < vectors; ++v)
        store(hashes + v * WIDTH, scramble(load<Bits>(hashes + v * WIDTH) ^ (Bits{} + call.seed)));
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
      across(p.vector, p.end_vector, [&](auto many, int v) { act(many, v, p.key, p.end_key); });
    }
  }

  // Whether a query sees a real key.
  bool sees(int64_t lane) const {
    const auto any = [&](int64_t from, int64_t to) {
      return from <= to && (!real || std::count(real + from, real + to + 1, true));
    };
    return any(first[lane], last[lane]) || (call.prefix && any(document[lane], prefix_last[lane]));
  }
};
