// The operators of attention: a part of native.cpp.

extern "C" {

// INPUTS -> RESULTS: out, statistics (..., n_q, 2), lse (..., n_q)
// The statistics of a row are a score near its highest, and the inverse of the sum of weights relative to that score.
// lse holds the same information, but weights computed from it would have the error of its last digit.
OPERATOR(attention_forward) {
  const Call call(x);
  const double rows = (double)call.groups * call.n_q;
  return kernel_of(call.level).forward(
      call, {x.typed(ForwardTo::out, call.q.type, rows * call.value_dim), x.floats(ForwardTo::statistics, rows * 2),
             x.floats(ForwardTo::lse, rows)});
}

// INPUTS, RECEIVED -> GRADIENTS
OPERATOR(attention_backward) {
  const Call call(x);
  const double rows = (double)call.groups * call.n_q, queries = rows * call.head_dim, outs = rows * call.value_dim;
  const double keys = (double)call.kv_groups * call.n_k;
  typedef BackwardTo To;
  const Type type = call.q.type;
  const Gradients grads{
      x.typed(To::out, type, outs),
      x.typed(To::dout, type, outs),
      x.typed(To::dq, type, queries),
      x.typed(To::dk, type, keys * call.head_dim),
      x.typed(To::dv, type, keys * call.value_dim),
      x.floats(To::statistics, rows * 2),
      x.floats(To::dlse, rows),
      call.bias ? x.floats(To::dbias, call.bias_numbers()) : nullptr,
      call.sinks ? x.floats(To::dsinks, call.sink_rows ? rows : call.sink_heads) : nullptr,
      call.emb ? x.floats(To::drel_pos_emb, (double)call.offsets * call.head_dim) : nullptr,
      call.emb && call.own_query ? x.floats(To::drel_pos_query, queries) : nullptr,
      nullptr,
      nullptr,
      nullptr};
  return kernel_of(call.level).backward(call, grads);
}

// segment_ids (batch, n) -> the first and the last position of each position's document (batch, n, 2)
// Both are int32, or both int64. A document is a run of one id. A negative id is padding, which belongs to no document:
// its last is before its first.
OPERATOR(document_bounds) {
  const int64_t batch = x.shape(0, 2)[0], n = x.shape(0, 2)[1];
  const auto find = [&](auto *ids, auto *bounds) {
    for (int64_t row = 0; row < batch; ++row, ids += n)
      for (int64_t first = 0, end; first < n; first = end) {
        for (end = first + 1; end < n && ids[end] == ids[first];) ++end;
        const bool padding = ids[first] < 0;
        for (int64_t j = first; j < end; ++j) *bounds++ = padding ? j : first, *bounds++ = padding ? j - 1 : end - 1;
      }
  };
  const double size = (double)batch * n;
  if (std::strcmp(x.types[0], "int32") == 0)
    find(x.get<const int32_t>(0, "int32", size), x.get<int32_t>(1, "int32", 2 * size));
  else
    find(x.get<const int64_t>(0, "int64", size), x.get<int64_t>(1, "int64", 2 * size));
  return true;
}

// MindSpore asks these for the shapes and types of outputs. Python functions in their place would be lost when it
// compiles a part of a graph again while that graph runs. A type is one of MindSpore's type numbers; every output has
// the type of the first input.
EXPORTED Shapes attention_forwardInferShape(int *ndims, int64_t **shapes, void *) {
  std::vector<int64_t> lse = shape_of(In::q, ndims, shapes), out = lse, statistics = lse;
  lse.pop_back(), statistics.back() = 2, out.back() = shape_of(In::v, ndims, shapes).back();
  return {out, statistics, lse};
}

EXPORTED std::vector<int> attention_forwardInferType(std::vector<int> types, void *) {
  return {types[In::q], types[In::bias], types[In::bias]};  // a bias is float32
}

static constexpr int WITH_GRADIENTS[] = {In::q, In::k, In::v, In::bias, In::sinks, In::rel_pos_emb, In::rel_pos_query};

EXPORTED Shapes attention_backwardInferShape(int *ndims, int64_t **shapes, void *) {
  Shapes to;
  for (int input : WITH_GRADIENTS) to.push_back(shape_of(input, ndims, shapes));
  return to;
}

EXPORTED std::vector<int> attention_backwardInferType(std::vector<int> types, void *) {
  std::vector<int> to;
  for (int input : WITH_GRADIENTS) to.push_back(types[input]);
  return to;
}

EXPORTED std::vector<int64_t> document_boundsInferShape(int *, int64_t **shapes, void *) {
  return {shapes[0][0], shapes[0][1], 2};
}

EXPORTED int document_boundsInferType(std::vector<int> types, void *) { return types[0]; }

}  // extern "C"
