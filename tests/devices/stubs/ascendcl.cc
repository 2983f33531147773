// One Ascend 910B whose memory is the host's, and the parts of GE's classes that their users read.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <string>

namespace ge {
struct StatusFactory {
  static StatusFactory *Instance();
  std::map<uint32_t, std::string> descriptions;
};
StatusFactory *StatusFactory::Instance() { static StatusFactory only; return &only; }

struct Like {  // has the layout of an Operator
  virtual ~Like() = default;
  std::shared_ptr<int> impl;
};
}  // namespace ge

extern "C" {
// Stubs of methods, which are chosen by mangled name: see STANDS_FOR in platforms.py.
void *stub_operator(void *self) { return new (self) ge::Like; }
void *stub_empty(void *self) { return memset(self, 0, 16); }
void *stub_vector(void *self) { return memset(self, 0, 24); }
void *stub_string(void *self) { return new (self) std::string; }
void *stub_self(void *self) { return self; }

int aclrtMalloc(void **data, size_t size, int) { *data = calloc(1, size + 512); return 0; }
int aclrtMallocHost(void **data, size_t size) { *data = calloc(1, size + 512); return 0; }
int aclrtMemcpy(void *to, size_t, const void *from, size_t size, int) { memmove(to, from, size); return 0; }
int aclrtMemcpyAsync(void *to, size_t, const void *from, size_t size, int, void *) { memmove(to, from, size); return 0; }
const char *aclrtGetSocName() { return "Ascend910B1"; }
int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
int aclrtGetDevice(int *device) { *device = 0; return 0; }
int aclrtGetMemInfo(int, size_t *free, size_t *total) { *free = *total = 8ull << 30; return 0; }
int aclrtCreateStream(void **stream) { *stream = malloc(8); return 0; }
int aclrtCreateStreamWithConfig(void **stream, uint32_t, uint32_t) { *stream = malloc(8); return 0; }
int aclrtCreateContext(void **context, int) { *context = malloc(8); return 0; }
int aclrtCreateEventExWithFlag(void **event, uint32_t) { *event = malloc(8); return 0; }
const char *aclGetRecentErrMsg() { return ""; }
}
