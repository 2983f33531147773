// What operators have in common, as MindSpore calls them: a part of native.cpp.

namespace {

// Returns 0 if all went well: no exception may reach MindSpore.
template <typename Do>
int guarded(Do &&act) {
  try {
    return act() ? 0 : FAILED;
  } catch (const std::invalid_argument &) {
    return WRONG_CALL;
  } catch (const std::exception &) {
    return FAILED;
  }
}

typedef std::vector<std::vector<int64_t>> Shapes;

std::vector<int64_t> shape_of(int input, const int *ndims, int64_t *const *shapes) {
  return std::vector<int64_t>(shapes[input], shapes[input] + ndims[input]);
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))
// A function as MindSpore calls it. `x` are its tensors; its body returns whether it could compute.
#define OPERATOR(name)                                                                                             \
  static bool name##_of(const Tensors &x);                                                                         \
  EXPORTED int name(int count, void **data, int *axes, int64_t **shapes, const char **types, void *, void *) {     \
    return guarded([&] { return expect(count > 0), name##_of({count, data, axes, shapes, types}); });              \
  }                                                                                                                \
  static bool name##_of(const Tensors &x)
