// A CUDA driver that launches nothing and writes what it is asked to launch to standard output.
#include <stdint.h>
#include <stdio.h>

struct Attribute {
  uint32_t id, padding;
  uint32_t value[16];
};
struct Config {
  uint32_t grid[3], block[3], shared_bytes;
  void* stream;
  Attribute* attributes;
  uint32_t num_attributes;
};

static void* current = nullptr;

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = current;
  return 0;
}
int cuCtxSetCurrent(void* context) {
  current = context;
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  current = context;
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  *context = current;
  current = nullptr;
  return 0;
}
int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_ILLEGAL_ADDRESS";
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = "an illegal memory access was encountered";
  return 0;
}

// Parameters are read as launch_probe takes them: two pointers, a struct of 16 bytes, a byte.
int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void**) {
  printf("function %p context %p stream %p", function, current, config->stream);
  printf(" grid %u %u %u", config->grid[0], config->grid[1], config->grid[2]);
  printf(" block %u %u %u", config->block[0], config->block[1], config->block[2]);
  printf(" shared %u", config->shared_bytes);
  for (uint32_t i = 0; i < config->num_attributes; ++i) {
    const Attribute& attribute = config->attributes[i];
    printf(" attribute %u: %u %u %u", attribute.id, attribute.value[0], attribute.value[1], attribute.value[2]);
  }
  const char* affine = static_cast<const char*>(parameters[2]);
  printf(" parameters %p %p", *static_cast<void**>(parameters[0]), *static_cast<void**>(parameters[1]));
  printf(" {%d %g %g}", *(const int32_t*)affine, *(const float*)(affine + 4), *(const double*)(affine + 8));
  printf(" %d\n", *static_cast<const int8_t*>(parameters[3]));
  fflush(stdout);
  return function == (void*)0xbad ? 700 : 0;
}
}
