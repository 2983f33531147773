// The operators that work row by row: a part of native.cpp.

namespace {

// Acts on every row. The shares depend on the number of rows alone, so sums over them do not depend on threads.
template <typename Do>
bool over_rows(const Rows &rows, int64_t shares, Do &&act) {
  const Kernel &kernel = kernel_of(rows.level);
  return in_parallel<NoMemory>(rows, shares, [&](NoMemory &, int64_t share) {
    for (int64_t row = share * rows.count / shares; row < (share + 1) * rows.count / shares; ++row)
      act(kernel, share, row);
  });
}

// Moves every token of all batch entries. `numbers`: threads, level, the position of the first query, frequencies.
template <typename Function>
bool move_all_heads(const Tensors &x, Heads heads, int numbers, Function Kernel::*move, int rows, int parts) {
  heads.frequencies = frequencies_of(x, numbers, heads.d);
  const int64_t *number = (const int64_t *)x.data[numbers];
  heads.first_query = number[2];
  const double each = (double)heads.batch * heads.n * heads.d;
  float *const row = x.floats(rows, each * (heads.heads + 2 * heads.kv_heads));
  float *const part[] = {x.floats(parts, each * heads.heads), x.floats(parts + 1, each * heads.kv_heads),
                         x.floats(parts + 2, each * heads.kv_heads)};
  Rows all(x, number);
  all.count = heads.batch * heads.n, all.d = (heads.heads + 2 * heads.kv_heads) * heads.d;
  const int64_t shares = std::min(heads.n, SHARES);
  const Kernel &kernel = kernel_of(all.level);
  return in_parallel<NoMemory>(all, shares, [&](NoMemory &, int64_t share) {
    (kernel.*move)(heads, share * heads.n / shares, (share + 1) * heads.n / shares, row, part);
  });
}

}  // namespace

extern "C" {

// x (..., d), gamma, beta, numbers -> y
OPERATOR(layer_norm_forward) {
  const int64_t *number = x.numbers(3, 3);
  const Rows rows(x, number);
  const float *from = x.floats(0, rows.size()), *gamma = x.floats(1, rows.d), *beta = x.floats(2, rows.d);
  float *y = x.floats(4, rows.size());
  return over_rows(rows, std::min(rows.count, SHARES), [&](const Kernel &kernel, int64_t, int64_t row) {
    kernel.layer_norm(from + row * rows.d, gamma, beta, epsilon_of(number), rows.d, y + row * rows.d);
  });
}

// x, gamma, numbers, dy -> dx, dgamma, dbeta
OPERATOR(layer_norm_backward) {
  const int64_t *number = x.numbers(2, 3);
  const Rows rows(x, number);
  const int64_t d = rows.d, shares = std::min(rows.count, SHARES);
  const float *from = x.floats(0, rows.size()), *gamma = x.floats(1, d), *dy = x.floats(3, rows.size());
  float *dx = x.floats(4, rows.size()), *dgamma = x.floats(5, d), *dbeta = x.floats(6, d);
  std::vector<float> parts(shares * 2 * d);
  const bool fine = over_rows(rows, shares, [&](const Kernel &kernel, int64_t share, int64_t row) {
    float *part = parts.data() + share * 2 * d;
    kernel.layer_norm_backward(from + row * d, gamma, epsilon_of(number), dy + row * d, d, dx + row * d, part,
                               part + d);
  });
  sum_rows(parts, shares);
  std::copy_n(parts.data(), d, dgamma);
  std::copy_n(parts.data() + d, d, dbeta);
  return fine;
}

// x (..., 2 d), numbers -> y (..., d)
OPERATOR(geglu_forward) {
  const Rows rows(x, x.numbers(1, 3));
  const int64_t half = rows.d / 2;
  expect(rows.d % 2 == 0);
  const float *from = x.floats(0, rows.size());
  float *y = x.floats(2, rows.size() / 2);
  return over_rows(rows, std::min(rows.count, SHARES), [&](const Kernel &kernel, int64_t, int64_t row) {
    kernel.geglu(from + row * rows.d, half, y + row * half);
  });
}

// x, numbers, dy -> dx
OPERATOR(geglu_backward) {
  const Rows rows(x, x.numbers(1, 3));
  const int64_t half = rows.d / 2;
  expect(rows.d % 2 == 0);
  const float *from = x.floats(0, rows.size()), *dy = x.floats(2, rows.size() / 2);
  float *dx = x.floats(3, rows.size());
  return over_rows(rows, std::min(rows.count, SHARES), [&](const Kernel &kernel, int64_t, int64_t row) {
    kernel.geglu_backward(from + row * rows.d, dy + row * half, half, dx + row * rows.d);
  });
}

// x (..., n, d), the position of the first of the n tokens (1), numbers -> y
// `numbers`: threads, level, whether to rotate back, d / 2 frequencies in radians per position.
OPERATOR(rotary) {
  const int axes = x.axes[0];
  expect(axes > 1);
  const int64_t n = x.shape(0, axes)[axes - 2], d = x.shape(0, axes)[axes - 1], half = d / 2;
  const std::vector<double> frequencies = frequencies_of(x, 2, d);
  expect(!frequencies.empty());
  const int64_t *number = (const int64_t *)x.data[2], start = *x.get<const int32_t>(1, "int32", 1);
  const Rows rows(x, number);
  const float *from = x.floats(0, rows.size());
  float *y = x.floats(3, rows.size());
  const double sign = number[2] ? -1 : 1;
  const int64_t shares = std::min(n, SHARES);
  const Kernel &kernel = kernel_of(rows.level);
  return in_parallel<NoMemory>(rows, shares, [&](NoMemory &, int64_t share) {
    std::vector<float> cosines(half), sines(half);
    for (int64_t token = share * n / shares; token < (share + 1) * n / shares; ++token) {
      for (int64_t c = 0; c < half; ++c) {
        const double angle = (double)(start + token) * frequencies[c];
        cosines[c] = (float)std::cos(angle), sines[c] = (float)(sign * std::sin(angle));
      }
      for (int64_t row = token; row < rows.count; row += n)
        kernel.rotate(from + row * d, cosines.data(), sines.data(), half, y + row * d);
    }
  });
}

// qkv (batch, n, (heads + 2 kv_heads) d), a tensor of shape (heads, kv_heads) that is not read, numbers as in
// `move_all_heads` -> q (batch, heads, n, d), k, v (batch, kv_heads, n, d), with q and k rotated
OPERATOR(split_heads) {
  const int64_t *qkv = x.shape(0, 3), heads = x.shape(1, 2)[0], kv_heads = x.shape(1, 2)[1];
  expect(heads < FARTHEST && kv_heads < FARTHEST);
  return move_all_heads(x, {qkv[0], qkv[1], heads, kv_heads, qkv[2] / (heads + 2 * kv_heads), 0, {}}, 2,
                        &Kernel::split_heads, 0, 3);
}

// dq, dk, dv, numbers -> dqkv
OPERATOR(join_heads) {
  const int64_t *q = x.shape(0, 4);
  return move_all_heads(x, {q[0], q[2], q[1], x.shape(1, 4)[1], q[3], 0, {}}, 3, &Kernel::join_heads, 4, 0);
}

// qkv (batch, 1, (heads + 2 kv_heads) d) of one token, ring buffers of keys and of values (batch kv_heads,
// prefix + kept, d), the token's position (1), its position in each row (batch) or in all rows (1), numbers
// -> q (batch heads, 1, d)
// The key and the value are written into the ring buffers, in place. `numbers` are those of `rotary`, with the prefix
// in place of whether to rotate back, and without frequencies for no rotation.
OPERATOR(enter_rings) {
  const int64_t *qkv = x.shape(0, 3), batch = qkv[0], groups = x.shape(1, 3)[0], places = x.shape(1, 3)[1],
                d = x.shape(1, 3)[2], all = qkv[2] / d, kv_heads = groups / batch, heads = all - 2 * kv_heads;
  const std::vector<double> frequencies = frequencies_of(x, 5, d);
  const int64_t *number = (const int64_t *)x.data[5], prefix = number[2], half = frequencies.size();
  const int64_t position = *x.get<const int32_t>(3, "int32", 1), own_rows = x.shape(4, 1)[0];
  const int32_t *const rows = x.get<const int32_t>(4, "int32", own_rows);
  expect(qkv[1] == 1 && groups % batch == 0 && heads > 0 && (own_rows == 1 || own_rows == batch));
  expect(position >= 0 && prefix >= 0 && prefix < places);
  const double size = (double)groups * places * d;
  float *const kept_keys = x.floats(1, size), *const kept_values = x.floats(2, size);
  float *const q = x.floats(6, (double)batch * heads * d);
  const float *const tokens = x.floats(0, (double)batch * all * d);
  const Kernel &kernel = kernel_of(number[1]);
  std::vector<float> cosines(half), sines(half);
  for (int64_t c = 0; c < half; ++c) {
    const double angle = position * frequencies[c];
    cosines[c] = (float)std::cos(angle), sines[c] = (float)std::sin(angle);
  }
  const auto turned = [&](const float *from, float *to) {
    if (half)
      kernel.rotate(from, cosines.data(), sines.data(), half, to);
    else
      std::copy_n(from, d, to);
  };
  for (int64_t row = 0; row < batch; ++row) {
    const float *from = tokens + row * all * d, *keys = from + heads * d, *values = keys + kv_heads * d;
    for (int64_t head = 0; head < heads; ++head) turned(from + head * d, q + (row * heads + head) * d);
    const int64_t own = rows[own_rows > 1 ? row : 0];
    for (int64_t head = 0; head < kv_heads; ++head) {
      float *const to_keys = kept_keys + (row * kv_heads + head) * places * d;
      float *const to_values = kept_values + (row * kv_heads + head) * places * d;
      const int64_t to = (prefix + position % (places - prefix)) * d;
      turned(keys + head * d, to_keys + to);
      std::copy_n(values + head * d, d, to_values + to);
      if (0 <= own && own < prefix) {
        std::copy_n(to_keys + to, d, to_keys + own * d);
        std::copy_n(to_values + to, d, to_values + own * d);
      }
    }
  }
  return true;
}

EXPORTED Shapes split_headsInferShape(int *, int64_t **shapes, void *) {
  const int64_t *qkv = shapes[0], heads = shapes[1][0], kv_heads = shapes[1][1];
  const int64_t d = qkv[2] / std::max<int64_t>(heads + 2 * kv_heads, 1);
  return {{qkv[0], heads, qkv[1], d}, {qkv[0], kv_heads, qkv[1], d}, {qkv[0], kv_heads, qkv[1], d}};
}

EXPORTED std::vector<int> split_headsInferType(std::vector<int> types, void *) {
  return std::vector<int>(3, types[0]);
}

EXPORTED std::vector<int64_t> join_headsInferShape(int *, int64_t **shapes, void *) {
  return {shapes[0][0], shapes[0][2], (shapes[0][1] + 2 * shapes[1][1]) * shapes[0][3]};
}

EXPORTED int join_headsInferType(std::vector<int> types, void *) { return types[0]; }

EXPORTED std::vector<int64_t> enter_ringsInferShape(int *, int64_t **shapes, void *) {
  return {shapes[0][0] * (shapes[0][2] / std::max<int64_t>(shapes[1][2], 1)) - 2 * shapes[1][0], 1, shapes[1][2]};
}

EXPORTED int enter_ringsInferType(std::vector<int> types, void *) { return types[0]; }

EXPORTED std::vector<int64_t> rotaryInferShape(int *ndims, int64_t **shapes, void *) {
  return shape_of(0, ndims, shapes);
}

EXPORTED int rotaryInferType(std::vector<int> types, void *) { return types[0]; }

EXPORTED std::vector<int64_t> layer_norm_forwardInferShape(int *ndims, int64_t **shapes, void *) {
  return shape_of(0, ndims, shapes);
}

EXPORTED int layer_norm_forwardInferType(std::vector<int> types, void *) { return types[0]; }

EXPORTED Shapes layer_norm_backwardInferShape(int *ndims, int64_t **shapes, void *) {
  return {shape_of(0, ndims, shapes), shape_of(1, ndims, shapes), shape_of(1, ndims, shapes)};
}

EXPORTED std::vector<int> layer_norm_backwardInferType(std::vector<int> types, void *) {
  return std::vector<int>(3, types[0]);
}

EXPORTED std::vector<int64_t> geglu_forwardInferShape(int *ndims, int64_t **shapes, void *) {
  std::vector<int64_t> shape = shape_of(0, ndims, shapes);
  shape.back() /= 2;
  return shape;
}

EXPORTED int geglu_forwardInferType(std::vector<int> types, void *) { return types[0]; }

EXPORTED std::vector<int64_t> geglu_backwardInferShape(int *ndims, int64_t **shapes, void *) {
  return shape_of(0, ndims, shapes);
}

EXPORTED int geglu_backwardInferType(std::vector<int> types, void *) { return types[0]; }

}  // extern "C"
