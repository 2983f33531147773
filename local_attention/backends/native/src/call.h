// The inputs and outputs of a call, and the functions that each width of vectors has: a part of native.cpp.

// The tensors and the numbers of a call, in their order. `attention_names` exports these lists, and ../library.py
// compares them with its own. A real number is passed as the bits of a double.
#define INPUTS(_)                                                                                                 \
  _(q) _(k) _(v) _(mask) _(documents) _(order) _(bias) _(sinks) _(rel_pos_emb) _(rel_pos_query) _(seed) _(numbers)
#define RESULTS(_) _(out) _(statistics) _(lse)
#define RECEIVED(_) _(out) _(statistics) _(dout) _(dlse)
#define GRADIENTS(_) _(dq) _(dk) _(dv) _(dbias) _(dsinks) _(drel_pos_emb) _(drel_pos_query)
#define INTEGERS(_)                                                                                                  \
  _(groups) _(kv_groups) _(n_q) _(n_k) _(head_dim) _(value_dim) _(bucket) _(spec_backward) _(spec_forward) _(causal)  \
  _(prefix) _(offset) _(batch) _(doc_batch) _(order_batch) _(bias_batch) _(heads) _(bias_rows) _(period) _(columns)  \
  _(bias_backward) _(offsets) _(own_query) _(sink_heads) _(sink_rows) _(hide_self) _(threads) _(level)               \
  _(first_group) _(first_position) _(beside)
#define REALS(_) _(scale) _(softcap) _(dropout)

#define NAMED(name) name,
#define TEXT(name) #name " "
#define ONE(name) +1
struct In {  // the places of tensors in a call; the inputs of the forward pass come first in both
  enum : int { INPUTS(NAMED) count };
};
struct ForwardTo {
  enum : int { before = In::count - 1, RESULTS(NAMED) };
};
struct BackwardTo {
  enum : int { before = In::count - 1, RECEIVED(NAMED) GRADIENTS(NAMED) };
};
constexpr int INTEGER_COUNT = 0 INTEGERS(ONE), REAL_COUNT = 0 REALS(ONE);

// Dropout's hashes, as in backends/dropout.py.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

inline uint32_t row_hash(int64_t group, int64_t query) {
  return mix(mix((uint32_t)group + 0x9E3779B9u) ^ mix((uint32_t)query + 0x85EBCA6Bu));
}

inline uint32_t column_hash(int64_t key) { return mix((uint32_t)key ^ 0x5BD1E995u); }

// Throws unless a call is as it should be: an operator that got something else returns WRONG_CALL.
inline void expect(bool right) {
  if (!right) throw std::invalid_argument("the tensors and the numbers of a call do not fit");
}

// Numbers of q, k, v, the output and their gradients, all of one type. Everything else is float32.
enum class Type { FLOAT32, FLOAT16, BFLOAT16 };
constexpr const char *TYPE_NAMES[] = {"float32", "float16", "bfloat16"};

struct Numbers {
  char *data;
  Type type;

  int64_t bytes() const { return type == Type::FLOAT32 ? 4 : 2; }
  char *at(int64_t place) const { return data + place * bytes(); }
};

// The inputs and then the outputs of a call, as MindSpore describes them.
struct Tensors {
  int count;
  void **data;
  int *axes;
  int64_t **shapes;
  const char **types;

  // Returns the shape of a tensor that has so many axes, none of them empty.
  const int64_t *shape(int x, int wanted) const {
    expect(x < count && axes[x] == wanted);
    for (int axis = 0; axis < wanted; ++axis) expect(shapes[x][axis] > 0);
    return shapes[x];
  }

  // Returns the data of a tensor of this type and size. Sizes are doubles, which do not overflow.
  template <typename T>
  T *get(int x, const char *type, double size) const {
    double found = 1;
    expect(x < count && std::strcmp(types[x], type) == 0);
    for (int axis = 0; axis < axes[x]; ++axis) found *= shapes[x][axis];
    expect(found == size && data[x]);
    return (T *)data[x];
  }
  float *floats(int x, double size) const { return get<float>(x, "float32", size); }
  Type type(int x) const {
    for (Type found : {Type::FLOAT32, Type::FLOAT16, Type::BFLOAT16})
      if (x < count && std::strcmp(types[x], TYPE_NAMES[(int)found]) == 0) return found;
    throw std::invalid_argument("of no such type");
  }
  Numbers typed(int x, Type type, double size) const { return {get<char>(x, TYPE_NAMES[(int)type], size), type}; }
  const int64_t *numbers(int x, double size) const { return get<const int64_t>(x, "int64", size); }
};

// Keys from the first to the last, both included; none if the last is before the first.
struct Span {
  int64_t first, last;
};

// How many numbers are in a row, and that rounded up to the widest vector.
struct Width {
  int64_t d, padded;

  Width(int64_t numbers = 0) : d(numbers), padded(divide_up(numbers, WIDEST) * WIDEST) {}
};

// Queries of a group, from `start` to `end` - 1.
struct Queries {
  int64_t group, start, end;

  Queries none() const { return {group, start, start}; }  // what follows the last block
};

// One call: its tensors and its numbers.
struct Call {
  Numbers q, k, v;           // (groups, n_q, head_dim), (kv_groups, n_k, head_dim), (kv_groups, n_k, value_dim)
  const bool *mask;          // (batch, n_k), true for a real key
  const int32_t *documents;  // (doc_batch, n_k, 2), the first and the last key of each key's document
  const int32_t *order;      // (order_batch, n_k): a query sees keys whose number is at most its own
  const float *bias;         // (heads, period, columns), or a row for each query, (bias_batch, heads, n_q, columns)
  const float *sinks;        // (sink_heads) or, one for each query, (groups, n_q)
  const float *emb;          // (offsets, head_dim)
  const float *emb_q;        // (groups, n_q, head_dim), what is multiplied by it; null if that is q
  uint32_t seed;

  // Among them: `bias_rows` and `sink_rows`, whether these have a row for each query; `own_query`, whether embeddings
  // have a query of their own; `first_group` and `first_position`, where this call begins in the whole problem, for
  // dropout; `beside`, how many heads are beside each other in a row of the output: all heads of a token, or 1.
#define MEMBER(name) int64_t name;
  INTEGERS(MEMBER)
#undef MEMBER
#define MEMBER(name) double name;
  struct Reals {
    REALS(MEMBER)
  };
#undef MEMBER
  int64_t share;              // groups that read the same keys
  Width of_keys, of_values;
  int64_t bias_size;  // of one head's bias
  float scale, softcap, kept_factor;
  int32_t drop_below;
  bool dropping;

  explicit Call(const Tensors &x) {
    const int64_t *number = x.numbers(In::numbers, INTEGER_COUNT + REAL_COUNT);
#define READ(name) name = *number++;
    INTEGERS(READ)
#undef READ
    Reals real;
    static_assert(sizeof(real) == REAL_COUNT * sizeof(*number));
    std::memcpy(&real, number, sizeof(real));
    check(real.dropout);
    scale = (float)real.scale, softcap = (float)real.softcap, dropping = real.dropout > 0;
    kept_factor = (float)(1 / (1 - real.dropout));
    drop_below = (int32_t)((int64_t)(real.dropout * 4294967296.) - 2147483648LL);
    const double queries = (double)groups * n_q, keys = (double)kv_groups * n_k;
    const Type type = x.type(In::q);
    q = x.typed(In::q, type, queries * head_dim), k = x.typed(In::k, type, keys * head_dim);
    v = x.typed(In::v, type, keys * value_dim);
    mask = batch ? x.get<const bool>(In::mask, "bool", (double)batch * n_k) : nullptr;
    documents = doc_batch ? x.get<const int32_t>(In::documents, "int32", 2. * doc_batch * n_k) : nullptr;
    order = order_batch ? x.get<const int32_t>(In::order, "int32", (double)order_batch * n_k) : nullptr;
    bias = columns ? x.floats(In::bias, bias_numbers()) : nullptr;
    sinks = sink_rows ? x.floats(In::sinks, queries) : sink_heads ? x.floats(In::sinks, sink_heads) : nullptr;
    emb = offsets ? x.floats(In::rel_pos_emb, (double)offsets * head_dim) : nullptr;
    emb_q = offsets && own_query ? x.floats(In::rel_pos_query, queries * head_dim) : nullptr;
    seed = *x.get<const uint32_t>(In::seed, "int32", 1);
    // No query sees farther, and no sum of these overflows.
    const int64_t farthest = std::max(n_k, offset + n_q) + 1;
    for (int64_t *size : {&bucket, &spec_backward, &spec_forward}) *size = std::min(*size, farthest);
    threads = std::min(threads, MOST_THREADS);
    first_group = (uint32_t)first_group, first_position = (uint32_t)first_position;  // hashes need no more of them
    prefix = std::min(prefix, n_k), share = groups / kv_groups;
    of_keys = head_dim, of_values = value_dim, bias_size = (bias_rows ? n_q : period) * columns;
  }

  // Checks the numbers by which something is divided, or that are sizes of something.
  void check(double rate) const {
    for (int64_t number : {groups, kv_groups, n_q, n_k, head_dim, value_dim, bucket, bias_batch, heads, period, threads,
                           beside})
      expect(number > 0);
    for (int64_t number : {spec_backward, prefix, offset, batch, doc_batch, order_batch, columns, bias_backward,
                           offsets, sink_heads})
      expect(number >= 0);
    for (int64_t part : {kv_groups, bias_batch, beside, batch, doc_batch, order_batch, sink_heads})
      expect(part == 0 || groups % part == 0);
    for (int64_t number : {n_q, n_k, offset}) expect(number < FARTHEST);
    expect(offset + n_q < FARTHEST && spec_forward >= -1 && rate >= 0 && rate < 1);
    expect(doc_batch == 0 || kv_groups % doc_batch == 0);
    expect((doc_batch == 0 && order_batch == 0) || offset + n_q <= n_k);
    expect((columns == 0 && offsets == 0) || bias_backward < 2 * FARTHEST);
    const int64_t shared = groups / kv_groups;
    expect(heads < shared || heads % shared == 0);
    expect(kv_groups % bias_batch == 0 && groups / bias_batch % heads == 0 && (bias_rows || bias_batch == 1));
  }

  double bias_numbers() const { return (double)bias_batch * heads * (bias_rows ? n_q : period) * columns; }

  // Where the bias of a group begins, in the bias and in its gradient.
  int64_t bias_place(int64_t group) const {
    return (group / (groups / bias_batch) * heads + group % heads) * bias_size;
  }

  // The stride from one row of a group to the next, in the output and in its gradient, and where a query's row begins.
  int64_t out_stride() const { return beside * value_dim; }
  int64_t out_place(int64_t group, int64_t query) const {
    return (group / beside * n_q + query) * out_stride() + group % beside * value_dim;
  }

  // The bounds of the documents of a group, null if there are none, and the document of a position.
  const int32_t *documents_of(int64_t group) const {
    return documents ? documents + 2 * (group / (groups / doc_batch) * n_k) : nullptr;
  }
  const int32_t *order_of(int64_t group) const {
    return order ? order + group / (groups / order_batch) * n_k : nullptr;
  }
  Span document(const int32_t *bounds, int64_t position) const {
    if (!bounds) return {0, n_k - 1};
    return {std::max<int64_t>(bounds[2 * position], 0), std::min<int64_t>(bounds[2 * position + 1], n_k - 1)};
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
    return 1. * groups * n_q * (head_dim + value_dim) *
           std::min<double>(n_k, (double)spec_backward + bucket + spec_forward + prefix);
  }
};

// A call on rows of d numbers: tensor 0 has them, and of `numbers` come first those of threads and the level.
struct Rows {
  int64_t threads, level, count, d;

  Rows(const Tensors &x, const int64_t *number) : threads(number[0]), level(number[1]), count(1) {
    const int axes = x.axes[0];
    expect(axes > 0 && threads > 0);
    const int64_t *shape = x.shape(0, axes);
    for (int axis = 0; axis < axes - 1; ++axis) count *= shape[axis];
    d = shape[axes - 1], threads = std::min(threads, MOST_THREADS);
  }

  double size() const { return (double)count * d; }
  double work() const { return 16. * count * d; }
};

// The third number of LayerNorm, as its bits.
inline float epsilon_of(const int64_t *number) {
  double real;
  std::memcpy(&real, number + 2, sizeof(real));
  return (float)real;
}

// Returns the frequencies at the end of `numbers`, in radians per position: d / 2, or none for no rotation.
inline std::vector<double> frequencies_of(const Tensors &x, int numbers, int64_t d) {
  const int64_t count = x.shape(numbers, 1)[0] - 3;
  expect(count == 0 || (count > 0 && d == 2 * count));
  std::vector<double> found(count);
  const int64_t *number = x.numbers(numbers, count + 3.);
  if (count) std::memcpy(found.data(), number + 3, count * sizeof(double));
  return found;
}

// Heads of projected tokens, and the rotation of queries and keys.
struct Heads {
  int64_t batch, n, heads, kv_heads, d;
  int64_t first_query;              // the position of the first query, counted from the first key's
  std::vector<double> frequencies;  // d / 2 of them, in radians per position; none for no rotation
};

struct Outputs {
  Numbers out;
  float *statistics, *lse;
};

struct Gradients {
  Numbers out, dout, dq, dk_to, dv_to;
  const float *statistics, *dlse;
  float *dbias, *dsinks, *demb, *demb_q;
  float *dk, *dv;      // what those of keys and values are summed in: these tensors themselves, if they are float32
  float *dsink_parts;  // (groups, blocks of queries), for sinks of heads
};

// Queries that one thread works on, block by block, for all groups that share one group of keys.
struct Chunk {
  float *dbias, *demb;
  int64_t position;  // of the chunk's first query
  float *dprefix;    // gradients of keys, then of values, in the prefix of a document begun earlier
  int64_t cleared;
};

// Zeroes the gradients of a group's keys from `cleared` up to `to`, and sets `cleared` to `to`. This happens shortly
// before they are first added to, and not for all keys at once, so that they are still in the processor's cache then.
void clear_keys(const Call &call, const Gradients &grads, int64_t group, int64_t &cleared, int64_t to) {
  if (to <= cleared) return;
  const int64_t from = group * call.n_k + cleared, rows = to - cleared;
  std::fill_n(grads.dk + from * call.head_dim, rows * call.head_dim, 0.f);
  std::fill_n(grads.dv + from * call.value_dim, rows * call.value_dim, 0.f);
  cleared = to;
}

// The functions of kernel.h, for one width of vectors.
struct Kernel {
  bool (*forward)(const Call &, const Outputs &);
  bool (*backward)(const Call &, Gradients);
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
