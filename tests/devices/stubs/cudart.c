/* One device of compute capability 8.0. Its memory is the host's. The offsets are those of CUDA 11's cudaDeviceProp. */
#include <stdlib.h>
#include <string.h>

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaMalloc(void **data, size_t size) { *data = calloc(1, size + 512); return 0; }
int cudaHostAlloc(void **data, size_t size, unsigned flags) { *data = calloc(1, size + 512); return 0; }
int cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = 4ull << 30; return 0; }
int cudaMemcpy(void *to, const void *from, size_t size) { memmove(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size) { memmove(to, from, size); return 0; }
int cudaStreamCreate(void **stream) { *stream = malloc(8); return 0; }
int cudaStreamCreateWithFlags(void **stream) { *stream = malloc(8); return 0; }
int cudaStreamCreateWithPriority(void **stream) { *stream = malloc(8); return 0; }
int cudaEventCreate(void **event) { *event = malloc(8); return 0; }
int cudaEventCreateWithFlags(void **event) { *event = malloc(8); return 0; }
const char *cudaGetErrorName(int error) { return ""; }
const char *cudaGetErrorString(int error) { return ""; }

int cudaGetDeviceProperties(char *all, int device) {
  memset(all, 0, 712);
  *(size_t *)(all + 288) = 4ull << 30;  /* totalGlobalMem */
  *(size_t *)(all + 296) = 49152;       /* sharedMemPerBlock */
  *(int *)(all + 304) = 65536;          /* regsPerBlock */
  *(int *)(all + 308) = 32;             /* warpSize */
  *(int *)(all + 320) = 1024;           /* maxThreadsPerBlock */
  int *block = (int *)(all + 324), *grid = (int *)(all + 336);
  block[0] = block[1] = 1024, block[2] = 64;
  grid[0] = 2147483647, grid[1] = grid[2] = 65535;
  *(int *)(all + 360) = 8;              /* major */
  *(int *)(all + 388) = 108;            /* multiProcessorCount */
  return 0;
}
