// How the work of a call is divided among threads, forward and backward: a part of native.cpp.

// Acts on items 0 ... count - 1: a worker that is free takes the next one. Returns false if one of them threw.
template <typename Worker, typename Task, typename Do>
bool in_parallel(const Task &task, int64_t count, Do &&act) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> fine{true};
  auto work = [&] {
    try {
      Worker worker(task);
      for (int64_t item = next++; item < count; item = next++) act(worker, item);
    } catch (const std::exception &) {
      fine = false;
    }
  };
  const int64_t wanted = std::min<int64_t>({task.threads, count, 1 + (int64_t)(task.work() / THREAD_WORK)});
  std::vector<std::thread> others;
  for (int64_t i = 1; i < wanted; ++i) try {
      others.emplace_back(work);
    } catch (const std::exception &) {  // no more threads can be started: those that run do it all
      break;
    }
  work();
  for (std::thread &other : others) other.join();
  return fine;
}

// A worker that needs no memory of its own.
struct NoMemory {
  template <typename Task>
  explicit NoMemory(const Task &) {}
};

// A thread takes runs of consecutive blocks, because they see mostly the same keys: first come the blocks of the groups
// that share a group of keys, then those of the next queries. Towards the end runs are short, so that no thread waits
// long.
template <typename Worker>
bool run_forward(const Call &call, const Outputs &outputs) {
  struct Run {
    int64_t next, end;
  };
  const int64_t blocks = divide_up(call.n_q, BLOCK_QUERIES), all = call.groups * blocks, each = blocks * call.share;
  const int64_t many = std::clamp<int64_t>(all / (8 * call.threads), 1, 32), few = divide_up(many, 16);
  const int64_t long_runs = std::max<int64_t>(all / many - 2 * call.threads, 0);
  std::atomic<int64_t> taken{0};
  const auto take = [&] {
    const int64_t number = taken++, long_before = std::min(number, long_runs);
    const int64_t start = long_before * many + (number - long_before) * few;
    return Run{start, std::min(start + (number < long_runs ? many : few), all)};
  };
  const auto block = [&](int64_t number) {
    const int64_t start = number % each / call.share * BLOCK_QUERIES;
    return Queries{number / each * call.share + number % call.share, start, std::min(start + BLOCK_QUERIES, call.n_q)};
  };
  return in_parallel<Worker>(call, std::min(call.threads, all), [&](Worker &worker, int64_t) {
    for (Run run = take(); run.next < run.end;) {
      const Queries now = block(run.next++);
      if (run.next == run.end) run = take();  // so early, because what it needs is fetched meanwhile
      worker.forward(now, run.next < run.end ? block(run.next) : now.none(), outputs);
    }
  });
}

// Adds up `count` rows of floats, in their order, into the first one.
void sum_rows(std::vector<float> &rows, int64_t count) {
  const int64_t size = rows.size() / count;
  for (int64_t row = 1; row < count; ++row)
    for (int64_t x = 0; x < size; ++x) rows[x] += rows[row * size + x];
}

// How a backward pass is divided. Gradients of keys are added up in place. No two threads may add to the same key, so
// the queries are divided into chunks that are longer than a span. The chunks of even number have no key in common and
// come first; then come those of odd number. A chunk is computed for all groups that share its keys. Only a prefix is
// seen from far away: a chunk has its own sums for the prefix of a document that began before the chunk, and they are
// added at the end.
//
// Gradients of tensors that heads or batch entries share are summed by one owner each, in slices. The slices are summed
// at the end. So the order of additions does not depend on which thread comes first. A bias with a row for each query
// needs no sums of slices if a slice has whole chunks, of all batch entries: no other slice has these rows.
struct Division {
  int64_t chunk, chunks, blocks;         // queries in a chunk; chunks of a group; its blocks of queries
  int64_t heads_owned, owners, batch;    // owners for each entry of the bias's batch, in all; key groups of an owner
  int64_t slices;                        // of an owner's chunks of one parity
  bool by_rows;                          // whether a slice has rows of the bias that no other one has
  int64_t emb_size, prefix_size, owned;  // owned: an owner's part of the bias

  explicit Division(const Call &call) {
    const int64_t after = call.prefix ? std::max(call.spec_forward, call.prefix) : call.spec_forward;
    const int64_t reach = std::min(call.spec_backward + after + 2 * call.bucket, call.n_q);
    chunk = divide_up(std::max<int64_t>(reach, 4 * BLOCK_QUERIES), BLOCK_QUERIES) * BLOCK_QUERIES;
    chunks = divide_up(call.n_q, chunk), blocks = divide_up(call.n_q, BLOCK_QUERIES);
    heads_owned = std::max<int64_t>(call.heads / call.share, 1);
    owners = call.bias ? call.bias_batch * heads_owned : call.emb ? 1 : call.kv_groups;
    batch = call.kv_groups / owners;
    const int64_t longest = divide_up(chunks, 2), enough = divide_up(2 * call.threads, owners);
    by_rows = call.bias_rows && call.bias && (batch == 1 || longest >= enough);
    slices = by_rows ? longest : batch * longest;
    if (call.emb || (call.bias && !by_rows)) slices = std::min(slices, enough);
    emb_size = call.offsets * call.of_keys.padded, prefix_size = call.prefix * (call.head_dim + call.value_dim);
    owned = call.bias_batch * call.heads * call.bias_size / owners;
  }

  // The units of a slice: each is a chunk of a key group, of `each` chunks of one parity.
  int64_t end_of(int64_t slice, int64_t each) const {
    return by_rows ? slice * each / slices * batch : slice * batch * each / slices;
  }

  struct Unit {
    int64_t key_group, number;  // of the chunk
    bool first;                 // of this chunk, among an owner's
  };
  Unit unit(const Call &call, int64_t owner, int64_t index, int64_t each, int64_t parity) const {
    const int64_t place = by_rows ? index % batch : index / each, at = by_rows ? index / batch : index % each;
    if (!call.bias) return {place * owners + owner, 2 * at + parity, place == 0};
    const int64_t entry = owner / heads_owned, head = owner % heads_owned;
    return {entry * (call.kv_groups / call.bias_batch) + place * heads_owned + head, 2 * at + parity, place == 0};
  }
};

// Adds what chunks have summed for the prefixes of documents that began before them.
void add_prefixes(const Call &call, const Gradients &grads, const Division &division, const float *parts) {
  for (int64_t number = 0; call.prefix && number < call.kv_groups * division.chunks; ++number) {
    const int64_t key_group = number / division.chunks;
    const int64_t position = call.offset + number % division.chunks * division.chunk;
    const Span within = call.document(call.documents_of(key_group * call.share), position);
    if (within.first == position) continue;
    const int64_t rows = std::min(call.prefix, within.last - within.first + 1);
    const float *dk = parts + number * division.prefix_size, *dv = dk + call.prefix * call.head_dim;
    const int64_t at = key_group * call.n_k + within.first;
    for (int64_t x = 0; x < rows * call.head_dim; ++x) grads.dk[at * call.head_dim + x] += dk[x];
    for (int64_t x = 0; x < rows * call.value_dim; ++x) grads.dv[at * call.value_dim + x] += dv[x];
  }
}

template <typename Worker>
bool run_backward(const Call &call, Gradients grads) {
  const Division division(call);
  const int64_t chunk = division.chunk, chunks = division.chunks, blocks = division.blocks;
  const int64_t owners = division.owners, slices = division.slices;
  const int64_t bias_size = division.owned * owners, copies = division.by_rows ? 0 : slices - 1;
  const auto uncleared = [](int64_t size) { return std::unique_ptr<float[]>(new float[size]); };
  const auto bias_parts = uncleared(copies * bias_size);  // the first slice adds to dbias itself
  const auto prefix_parts = uncleared(call.kv_groups * chunks * division.prefix_size);
  std::vector<float> emb_parts(slices * owners * division.emb_size);
  const bool turns = call.k.type != Type::FLOAT32;
  const int64_t keys = call.kv_groups * call.n_k, k_size = keys * call.head_dim, v_size = keys * call.value_dim;
  const auto sums = uncleared(turns ? k_size + v_size : 0);
  grads.dk = turns ? sums.get() : (float *)grads.dk_to.data;
  grads.dv = turns ? sums.get() + k_size : (float *)grads.dv_to.data;
  std::vector<float> sink_parts(call.sink_heads ? call.groups * blocks : 0);
  grads.dsink_parts = sink_parts.data();

  const auto first_key = [&](int64_t query) {  // at or before every key in the spans of this query and later ones
    if (query == 0 || query >= call.n_q) return query ? call.n_k : 0;
    return std::clamp<int64_t>(call.offset + query + 1 - call.bucket - call.spec_backward, 0, call.n_k);
  };
  bool fine = true;
  for (int64_t parity = 0; parity < std::min<int64_t>(chunks, 2); ++parity) {
    const int64_t each = (chunks + 1 - parity) / 2;
    fine = fine && in_parallel<Worker>(call, slices * owners, [&](Worker &worker, int64_t item) {
      const int64_t slice = item / owners, owner = item % owners;
      float *bias_part = slice && copies ? bias_parts.get() + (slice - 1) * bias_size : grads.dbias;
      if (!parity && !division.by_rows) std::fill_n(bias_part + owner * division.owned, division.owned, 0.f);
      for (int64_t index = division.end_of(slice, each); index < division.end_of(slice + 1, each); ++index) {
        const Division::Unit unit = division.unit(call, owner, index, each, parity);
        const int64_t from = unit.number * chunk, to = std::min(from + chunk, call.n_q);
        const int64_t group = unit.key_group * call.share;
        for (int64_t head = 0; unit.first && division.by_rows && head < division.owned / call.bias_size; ++head)
          std::fill_n(grads.dbias + owner * division.owned + head * call.bias_size + from * call.columns,
                      (to - from) * call.columns, 0.f);
        float *prefix_part = prefix_parts.get() + (unit.key_group * chunks + unit.number) * division.prefix_size;
        if (call.document(call.documents_of(group), call.offset + from).first < call.offset + from)
          std::fill_n(prefix_part, division.prefix_size, 0.f);
        Chunk state{bias_part, emb_parts.data() + item * division.emb_size, call.offset + from, prefix_part,
                    parity ? call.n_k : first_key(from)};
        const auto block = [&](int64_t number) {
          const int64_t start = from + number / call.share * BLOCK_QUERIES;
          return Queries{group + number % call.share, start, std::min(start + BLOCK_QUERIES, to)};
        };
        const int64_t all = divide_up(to - from, BLOCK_QUERIES) * call.share;
        for (int64_t number = 0; number < all; ++number) {
          const Queries now = block(number), next = number + 1 < all ? block(number + 1) : now.none();
          worker.backward(now, next, grads, state);
        }
        clear_keys(call, grads, unit.key_group, state.cleared, first_key(from + 2 * chunk));
      }
    });
  }
  add_prefixes(call, grads, division, prefix_parts.get());
  const int64_t shares = turns ? std::min(call.kv_groups, 4 * call.threads) : 0;
  fine = fine && (!turns || in_parallel<Worker>(call, shares, [&](Worker &worker, int64_t share) {
    const int64_t from = share * keys / shares, to = (share + 1) * keys / shares;
    worker.write_keys(grads.dk, from, to, call.head_dim, grads.dk_to);
    worker.write_keys(grads.dv, from, to, call.value_dim, grads.dv_to);
  }));
  for (int64_t copy = 0; copy < copies; ++copy)
    for (int64_t x = 0; x < bias_size; ++x) grads.dbias[x] += bias_parts[copy * bias_size + x];
  for (int64_t head = 0; head < call.sink_heads; ++head) {
    double total = 0;
    for (int64_t group = head; group < call.groups; group += call.sink_heads)
      for (int64_t block = 0; block < blocks; ++block) total += sink_parts[group * blocks + block];
    grads.dsinks[head] = (float)total;
  }
  if (call.emb) {
    sum_rows(emb_parts, slices * owners);
    for (int64_t row = 0; row < call.offsets; ++row)
      std::copy_n(&emb_parts[row * call.of_keys.padded], call.head_dim, grads.demb + row * call.head_dim);
  }
  return fine;
}
