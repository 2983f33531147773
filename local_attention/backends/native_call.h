// The inputs and outputs of a call, and the functions that each width of vectors has: a part of native.cpp.

// Dropout's hashes, as in backends/dropout.py.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

inline uint32_t row_hash(int64_t group, int64_t query) {
  return mix(mix((uint32_t)group + 0x9E3779B9u) + (uint32_t)query);
}

inline uint32_t column_hash(int64_t key) { return mix((uint32_t)key ^ 0x5BD1E995u); }

// Keys from the first to the last, both included; none if the last is before the first.
struct Span {
  int64_t first, last;
};

// Queries of a group, from `start` to `end` - 1.
struct Queries {
  int64_t group, start, end;

  Queries none() const { return {group, start, start}; }  // what follows the last block
};

// One call: its tensors, and its numbers in the order in which native.py lists them.
struct Call {
  const float *q, *k, *v;    // (groups, n_q, head_dim), (kv_groups, n_k, head_dim) twice
  const bool *mask;          // (batch, n_k), true for a real key
  const int32_t *documents;  // (doc_batch, n_k, 2), the first and the last key of each key's document
  const float *bias;         // (heads, period, columns)
  const float *sinks;        // (sink_heads)
  const float *emb;          // (offsets, head_dim)
  uint32_t seed;

  int64_t groups, kv_groups, n_q, n_k, head_dim, bucket, spec_backward, spec_forward, causal, prefix, offset, batch,
      doc_batch, heads, period, columns, bias_backward, offsets, sink_heads, hide_self, threads, level;
  int64_t first_group, first_position;  // where this call begins in the whole problem, for dropout
  int64_t beside;             // heads beside each other in a row of the output: all heads of a token, or 1
  int64_t share;              // groups that read the same keys
  int64_t padded, bias_size;  // head_dim rounded up to the widest vector, and the size of one head's bias
  float scale, softcap, kept_factor;
  int32_t drop_below;
  bool dropping;

  explicit Call(void **inputs) {
    const int64_t *number = (const int64_t *)inputs[9];
    for (int64_t *to : {&groups, &kv_groups, &n_q, &n_k, &head_dim, &bucket, &spec_backward, &spec_forward, &causal,
                        &prefix, &offset, &batch, &doc_batch, &heads, &period, &columns, &bias_backward, &offsets,
                        &sink_heads, &hide_self, &threads, &level, &first_group, &first_position, &beside})
      *to = *number++;
    double real[3];  // passed as their bits
    std::memcpy(real, number, sizeof(real));
    const double rate = real[2];
    scale = (float)real[0], softcap = (float)real[1], dropping = rate > 0, kept_factor = (float)(1 / (1 - rate));
    drop_below = (int32_t)((int64_t)(rate * 4294967296.) - 2147483648LL);
    q = (const float *)inputs[0], k = (const float *)inputs[1], v = (const float *)inputs[2];
    mask = batch ? (const bool *)inputs[3] : nullptr;
    documents = doc_batch ? (const int32_t *)inputs[4] : nullptr;
    bias = columns ? (const float *)inputs[5] : nullptr;
    sinks = sink_heads ? (const float *)inputs[6] : nullptr;
    emb = offsets ? (const float *)inputs[7] : nullptr;
    seed = *(const uint32_t *)inputs[8];
    prefix = std::min(prefix, n_k), share = groups / kv_groups;
    padded = divide_up(head_dim, WIDEST) * WIDEST, bias_size = period * columns;
  }

  // The stride from one row of a group to the next, in the output and in its gradient, and where a query's row begins.
  int64_t out_stride() const { return beside * head_dim; }
  int64_t out_place(int64_t group, int64_t query) const {
    return (group / beside * n_q + query) * out_stride() + group % beside * head_dim;
  }

  // The bounds of the documents of a group, null if there are none, and the document of a position.
  const int32_t *documents_of(int64_t group) const {
    return documents ? documents + 2 * (group / (groups / doc_batch) * n_k) : nullptr;
  }
  Span document(const int32_t *bounds, int64_t position) const {
    return bounds ? Span{bounds[2 * position], bounds[2 * position + 1]} : Span{0, n_k - 1};
  }

  // The keys that the query at a position sees by its window, without the prefix; its bucket begins at `start`.
  Span span(int64_t position, int64_t start, const Span &within) const {
    int64_t last = start + bucket - 1 + spec_forward;
    if (causal) last = std::min(last, position);
    return {std::max(start - spec_backward, within.first), std::min(last, within.last)};
  }

  int64_t prefix_last(int64_t position, const Span &within) const {
    const int64_t last = std::min(within.first + prefix - 1, within.last);
    return causal ? std::min(last, position) : last;
  }

  double work() const {
    return 2. * groups * n_q * head_dim *
           std::min<double>(n_k, (double)spec_backward + bucket + spec_forward + prefix);
  }
};

// A call on rows of d numbers.
struct Rows {
  int64_t threads, level, count, d;
  float epsilon;

  Rows(const void *numbers, int axes, const int64_t *shape) : count(1), d(shape[axes - 1]) {
    const int64_t *number = (const int64_t *)numbers;
    double real;  // passed as its bits
    std::memcpy(&real, number + 2, sizeof(real));
    threads = number[0], level = number[1], epsilon = (float)real;
    for (int axis = 0; axis < axes - 1; ++axis) count *= shape[axis];
  }

  double work() const { return 16. * count * d; }
};

// Heads of projected tokens, and the rotation of queries and keys.
struct Heads {
  int64_t batch, n, heads, kv_heads, d;
  int64_t first_query;              // the position of the first query, counted from the first key's
  std::vector<double> frequencies;  // d / 2 of them, in radians per position; none for no rotation
};

struct Outputs {
  float *out, *statistics, *lse;
};

struct Gradients {
  const float *out, *statistics, *dout, *dlse;
  float *dq, *dk, *dv;
  float *dsink_parts;  // (groups, blocks of queries)
};

// Queries that one thread works on, block by block, for all groups that share one group of keys.
struct Chunk {
  float *dbias, *demb;
  int64_t position;  // of the chunk's first query
  float *dprefix;    // (2, prefix, head_dim): gradients of keys and values, in the prefix of a document begun earlier
  int64_t cleared;
};

// Zeroes the gradients of a group's keys from `cleared` up to `to`, and sets `cleared` to `to`. This happens shortly
// before they are first added to, and not for all keys at once, so that they are still in the processor's cache then.
void clear_keys(const Call &call, const Gradients &grads, int64_t group, int64_t &cleared, int64_t to) {
  if (to <= cleared) return;
  for (float *rows : {grads.dk, grads.dv})
    std::fill(rows + (group * call.n_k + cleared) * call.head_dim, rows + (group * call.n_k + to) * call.head_dim, 0.f);
  cleared = to;
}

// The functions of native_kernel.h, for one width of vectors.
struct Kernel {
  bool (*forward)(const Call &, const Outputs &);
  bool (*backward)(const Call &, Gradients, float *dbias, float *dsinks, float *demb);
  // These work on one row.
  void (*layer_norm)(const float *x, const float *gamma, const float *beta, float epsilon, int64_t d, float *y);
  void (*layer_norm_backward)(const float *x, const float *gamma, float epsilon, const float *dy, int64_t d, float *dx,
                              float *dgamma, float *dbeta);
  void (*geglu)(const float *x, int64_t d, float *y);
  void (*geglu_backward)(const float *x, const float *dy, int64_t d, float *dx);
  void (*rotate)(const float *x, const float *cosines, const float *sines, int64_t half, float *y);
  // These work on tokens from ... to - 1 of each batch entry.
  void (*split_heads)(const Heads &heads, int64_t from, int64_t to, float *rows, float *const *parts);
  void (*join_heads)(const Heads &heads, int64_t from, int64_t to, float *rows, float *const *parts);
};
