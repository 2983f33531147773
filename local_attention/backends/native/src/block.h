// A block of queries and its tiles of keys, one after the other: a part of kernel.h.

constexpr float HIDES = -1e29f;  // a bias below it hides its key
constexpr int KEYS = 64;   // in a tile
constexpr int PIECE = 16;  // keys in a piece: a tile that some queries do not see whole is divided into these

// Keys key ... end_key - 1 of a tile, and the vectors of queries, vector ... end_vector - 1, that see any of them.
struct Piece {
  int key, end_key, vector, end_vector;
  int32_t most;  // the highest number of these keys in the order
};

// The memory of one thread, its present block of queries, and its present tile of keys.
struct Block {
  const Call &call;
  const int64_t d, padded;  // of queries and keys
  const Width of_keys, of_values;
  std::unique_ptr<float[]> memory;
  float *q_t, *q_emb_t, *out_t, *scores, *slopes, *q, *q_scaled, *dout, *dout_t, *dscores, *dq_emb_t, *by_offset;
  float *q_floats, *k_floats, *v_floats, *dout_floats, *out_floats;  // for numbers of two bytes
  float *one;  // products with a single query, or with keys whose rows are not whole vectors

  int64_t group, key_group, start, count;  // the block: queries start ... start + count - 1 of a group
  int vectors;
  // For each query: its position, the first and the last key of its span, the first key of its document, where its
  // prefix begins, and the last key of that prefix. None of these decreases from one query to the next.
  int32_t positions[QUERIES], first[QUERIES], last[QUERIES], document[QUERIES]{}, prefix_last[QUERIES]{};
  int64_t bias_rows[QUERIES], columns_from[QUERIES];  // each query's row of the bias, and the key of its column 0
  uint32_t hashes[QUERIES];                            // each query's hash for dropout
  float highest[QUERIES], top[QUERIES], sum[QUERIES], dot[QUERIES], sinks[QUERIES];
  const float *q_rows, *k_rows, *v_rows;  // the block's queries, and the tile's keys and values, as float32
  const bool *real;      // which keys are real; null if all are
  const int32_t *order;  // of keys; null if there is none
  int32_t own[QUERIES];  // of queries, and the lowest and the highest of each vector and of all
  int32_t lowest_own[QUERIES / WIDTH + 1], highest_own[QUERIES / WIDTH + 1];
  float unit = LOG2_E;  // scores are in units of log(2), or twice that where they would overflow in these

  int64_t key;  // the tile: keys key ... key + keys - 1
  int keys, pieces;
  int64_t begun;  // if the tile is of a prefix: where its document begins
  // Whether the tile is of a prefix, whether some of it is unseen, by its order too, and whether products of what is
  // unseen are skipped.
  bool in_prefix, partial, ordered, careful;
  Piece piece[KEYS / PIECE];
  Ahead ahead;

  explicit Block(const Call &c)
      : call(c), d(c.head_dim), padded(c.of_keys.padded), of_keys(c.of_keys), of_values(c.of_values) {
    const int64_t down = d * QUERIES, wide = QUERIES * padded, tile = KEYS * QUERIES;
    const int64_t values_down = of_values.d * QUERIES, values_wide = QUERIES * of_values.padded;
    const int64_t widest = std::max(padded, of_values.padded);
    const bool turns = c.q.type != Type::FLOAT32;
    float **parts[] = {&q_t, &q_emb_t, &out_t, &dout_t, &dq_emb_t, &q, &q_scaled, &dout, &one, &scores, &dscores,
                       &slopes, &by_offset, &q_floats, &k_floats, &v_floats, &dout_floats, &out_floats};
    const int64_t sizes[] = {down, call.emb ? down : 0, std::max(down, values_down), values_down, down, wide, wide,
                             values_wide, KEYS * widest, tile, tile, call.softcap > 0 ? tile : 0,
                             call.emb ? (KEYS + QUERIES) * QUERIES : 0,
                             turns ? wide : 0, turns ? KEYS * d : 0, turns ? KEYS * of_values.d : 0,
                             turns ? values_wide : 0, turns ? QUERIES * widest : 0};
    int64_t total = WIDTH;
    for (int64_t size : sizes) total += size;
    memory.reset(new float[total]);  // memory that is never touched costs nothing
    float *next = memory.get() + (-(uintptr_t)memory.get() / 4) % WIDTH;  // aligned to a vector
    for (size_t i = 0; i < std::size(sizes); ++i) *parts[i] = next, next += sizes[i];
    for (float *of : {q, q_scaled})
      if (d < padded) std::fill_n(of, wide, 0.f);
    if (of_values.d < of_values.padded) std::fill_n(dout, values_wide, 0.f);
  }

  bool halved() const { return unit < LOG2_E; }

  // Reads a block of queries whose scores are to be `halved` or not.
  void read_block(const Queries &block, bool halved) {
    unit = halved ? LOG2_E / 2 : LOG2_E;
    group = block.group, key_group = group / call.share, start = block.start, count = block.end - start;
    vectors = (count + WIDTH - 1) / WIDTH;
    const int64_t at = (group * call.n_q + start) * d;
    for (const char *x = call.q.at(at); x < call.q.at(at + count * d); x += CACHE_LINE) __builtin_prefetch(x);
    real = call.mask ? call.mask + group / (call.groups / call.batch) * call.n_k : nullptr;
    order = call.order_of(group);
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
        bias_rows[lane] = (call.bias_rows ? start + std::min<int64_t>(lane, count - 1) : in_period) * call.columns;
        columns_from[lane] = position - in_period - call.bias_backward;
      }
      if (order) own[lane] = order[position];
      if (call.dropping) hashes[lane] = row_hash(call.first_group + group, call.first_position + position);
    }
    if (order) read_order();
    read_sinks();
    q_rows = read(call.q, at, d, count, d, q_floats);
    transpose(count, d, q_rows, d, q_t, QUERIES, call.softcap > 0 ? call.scale / call.softcap : call.scale * unit);
    if (call.emb) transpose(count, d, call.emb_q ? call.emb_q + at : q_rows, d, q_emb_t, QUERIES, unit);
    if (call.dropping)
      for (int v = 0; v < vectors; ++v)
        store(hashes + v * WIDTH, scramble(load<Bits>(hashes + v * WIDTH) ^ (Bits{} + call.seed)));
  }

  // Returns rows as float32: where they are, or turned into such at `to`, one after the other.
  const float *read(const Numbers &from, int64_t at, int64_t stride, int64_t rows, int64_t width, float *to) {
    if (from.type == Type::FLOAT32) return (const float *)from.at(at);
    to_floats(from.type, (const uint16_t *)from.at(at), stride, rows, width, to);
    return to;
  }

  // Writes the transpose of `from`, times a factor, as rows of a result.
  template <typename Factor>
  void write(const float *from, int64_t width, Factor factor, const Numbers &to, int64_t at, int64_t stride) {
    if (to.type == Type::FLOAT32)
      return transpose(width, count, from, QUERIES, (float *)to.at(at), stride, factor, width);
    transpose(width, count, from, QUERIES, out_floats, width, factor, width);
    to_halves(to.type, out_floats, count, width, (uint16_t *)to.at(at), stride);
  }

  void read_keys() {
    k_rows = read(call.k, first_row() * d, d, keys, d, k_floats);
    v_rows = read(call.v, first_row() * of_values.d, of_values.d, keys, of_values.d, v_floats);
  }

  static void write_keys(const float *sums, int64_t from, int64_t to, int64_t width, const Numbers &into) {
    to_halves(into.type, sums + from * width, to - from, width, (uint16_t *)into.at(from * width), width);
  }

  void read_order() {
    int32_t &lowest = lowest_own[vectors], &highest_of_all = highest_own[vectors];
    for (int v = 0; v < vectors; ++v) {
      const auto [low, high] = std::minmax_element(own + v * WIDTH, own + (v + 1) * WIDTH);
      lowest_own[v] = *low, highest_own[v] = *high;
      lowest = v ? std::min(lowest, *low) : *low, highest_of_all = v ? std::max(highest_of_all, *high) : *high;
    }
  }

  // Reads the sink of each query, in the units of scores; -inf is none.
  void read_sinks() {
    const float *const of_rows = call.sink_rows ? call.sinks + group * call.n_q + start : nullptr;
    const float of_head = call.sinks && !of_rows ? call.sinks[group % call.sink_heads] * unit : -INFINITY;
    for (int lane = 0; lane < QUERIES; ++lane) sinks[lane] = of_rows && lane < count ? of_rows[lane] * unit : of_head;
  }

  // Plans to fetch what the next block needs and this one does not: its queries, and rows of keys in these tensors, each
  // of so many bytes.
  void look_ahead(const Queries &next, std::initializer_list<std::pair<const void *, int64_t>> tensors) {
    const int64_t next_group = next.group / call.share, position = call.offset + next.start;
    const Span within = call.document(call.documents_of(next.group), position);
    int64_t from = call.span(position, position + 1 - call.bucket, within).first;  // that it may see
    if (next_group == key_group) from = std::max(from, end_of_keys());
    const int64_t end = std::min(end_of_keys() + next.start - start, call.n_k);  // if it sees as far as this block does
    ahead.left = 0;
    for (const auto &[x, width] : tensors)
      ahead.add((const char *)x + (next_group * call.n_k + from) * width, std::min<int64_t>(end - from, 4 * KEYS),
                width, width);
    plan(call.q, next.group * call.n_q + next.start, next.end - next.start, d, d);
  }

  void plan(const Numbers &of, int64_t row, int64_t rows, int64_t stride, int64_t width) {
    ahead.add(of.at(row * stride), rows, stride * of.bytes(), width * of.bytes());
  }

  // About how many parts a product of the block with all of its keys has: see `matmul`.
  int64_t parts() const { return (end_of_keys() - first_key()) / 4; }

  const float *copied(const float *from, int64_t stride, const Width &width, float *to, float factor) {
    for (int64_t lane = 0; lane < count; ++lane)
      for (int64_t c = 0; c < width.d; ++c) to[lane * width.padded + c] = factor * from[lane * stride + c];
    return to;
  }

  // Returns rows of whole vectors, one after the other: the given rows if they are such, else a copy.
  const float *in_vectors(const float *from, int64_t stride, const Width &width, float *to) {
    return width.d == width.padded && stride == width.d ? from : copied(from, stride, width, to, 1);
  }

  int64_t first_key() const { return first[0]; }
  int64_t end_of_keys() const { return last[count - 1] + 1; }
  int64_t first_row() const { return key_group * call.n_k + key; }
  int count_real() const { return real ? std::count(real + key, real + key + keys, true) : keys; }

  // Acts on one tile after the other: those of the prefix of each document in the block, then those of the spans.
  template <typename Act>
  INLINE void over_keys(Act &&act) {
    for (int lane = 0, end = 1; call.prefix && lane < count; lane = end++) {
      while (end < count && document[end] == document[lane]) ++end;
      for (int64_t tile = document[lane]; tile <= prefix_last[end - 1]; tile += KEYS)
        if (read_prefix(tile, lane, end)) read_keys(), act();
    }
    // Tiles are counted from the diagonal, so that as few as possible are across it.
    const int64_t diagonal = last[0] + (last[0] == last[count - 1]);
    int64_t tile = first_key(), next = tile + (tile < diagonal ? (diagonal - tile - 1) % KEYS + 1 : KEYS);
    for (; tile < end_of_keys(); tile = next, next += KEYS)
      if (read_tile(tile, next)) read_keys(), act();
  }

  // Compares the order of keys of the tile from ... to - 1 with that of queries: returns false if none of these sees
  // any, and sets `ordered` if some do not see all. `most` becomes the highest of the keys' numbers.
  bool compare_order(int from, int to, int32_t lowest, int32_t highest_of_all, int32_t &most) {
    int32_t least = most = order[key + from];
    for (int j = from + 1; j < to; ++j) least = std::min(least, order[key + j]), most = std::max(most, order[key + j]);
    ordered |= most > lowest;
    return least <= highest_of_all;
  }

  bool some_in_order(int32_t &most) {
    ordered = false;
    return !order || compare_order(0, keys, lowest_own[vectors], highest_own[vectors], most);
  }

  // Leaves out of a piece the vectors at either end that see none of its keys by their order.
  void narrow(Piece &p) {
    if (!ordered) return;
    const auto sees_none = [&](int v) {
      return !compare_order(p.key, p.end_key, lowest_own[v], highest_own[v], p.most);
    };
    while (p.vector < p.end_vector && sees_none(p.vector)) ++p.vector;
    while (p.vector < p.end_vector && sees_none(p.end_vector - 1)) --p.end_vector;
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
    piece[0] = {0, keys, lane / WIDTH, (end + WIDTH - 1) / WIDTH, 0}, pieces = 1;
    return lane < end && count_real() && some_in_order(piece[0].most);
  }

  // Reads the tile of spans with keys from ... to - 1, as far as there are any. Returns false if none is real, or if
  // all come later in the order than every query.
  bool read_tile(int64_t from, int64_t to) {
    in_prefix = false, key = from, keys = std::min<int64_t>(to, end_of_keys()) - from;
    const int real_keys = count_real();
    int32_t most = 0;
    if (!some_in_order(most)) return false;
    const bool spanned = first[count - 1] <= key && key + keys <= last[0] + 1 && !ordered;
    partial = !spanned || real_keys < keys;
    pieces = 0;
    if (spanned) piece[pieces++] = {0, keys, 0, vectors, most};
    for (int j = 0; !spanned && j < keys; j += PIECE) {
      Piece next{j, std::min(j + PIECE, keys), 0, vectors, most};
      int &vector = next.vector, &end = next.end_vector;
      while (vector < end && last[std::min<int64_t>((vector + 1) * WIDTH, count) - 1] < key + j) ++vector;
      while (end > vector && first[(end - 1) * WIDTH] >= key + next.end_key) --end;
      narrow(next);
      if (vector == end) continue;
      Piece *const before = pieces ? &piece[pieces - 1] : nullptr;
      if (before && before->end_key == j && before->vector == vector && before->end_vector == end)
        before->end_key = next.end_key, before->most = std::max(before->most, next.most);
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
      bool found = false;
      for (int64_t j = from; j <= to && !found; ++j) found = (!real || real[j]) && (!order || order[j] <= own[lane]);
      return found;
    };
    return any(first[lane], last[lane]) || (call.prefix && any(document[lane], prefix_last[lane]));
  }
};
