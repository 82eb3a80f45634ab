// Launches a kernel from one packed record: the quick path under launcher.py.
//
// The record is made by a single struct.pack, so a launch costs Python one call into this library. The driver's types
// are declared here: building needs no CUDA headers, and the driver is found when the first kernel is launched.
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

#define AQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Result = int;  // CUresult
constexpr Result kNotFound = 500, kInvalidValue = 1;
constexpr uint32_t kMaxParameters = 64;

struct Attribute {  // CUlaunchAttribute
  uint32_t id;
  uint32_t padding;
  union {
    uint32_t dimensions[3];
    int32_t flag;
    char bytes[64];
  } value;
};
static_assert(sizeof(Attribute) == 72, "as cuda.h has it");
constexpr uint32_t kClusterDimension = 4, kProgrammaticStreamSerialization = 6;

struct Config {  // CUlaunchConfig
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;
  void* stream;
  Attribute* attributes;
  uint32_t num_attributes;
};
static_assert(offsetof(Config, stream) == 32 && sizeof(Config) == 56, "as cuda.h has it");

// What launcher.py packs, in front of the kernel's parameters.
struct Launch {
  void* function;
  void* context;
  void* stream;
  const uint32_t* offsets;  // of each parameter from the start of the record
  uint32_t num_parameters;
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t cluster[3];  // all 0: none
  uint32_t shared_bytes;
  uint32_t programmatic;
};
static_assert(sizeof(Launch) == 80, "as launcher.py packs it");

struct Driver {
  Result (*launch)(const Config*, void*, void**, void**);
  Result (*get_context)(void**);
  Result (*set_context)(void*);
};

const Driver* find_driver() {
  static const Driver driver = [] {
    Driver found{};
    if (void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {
      found.launch = reinterpret_cast<decltype(found.launch)>(dlsym(library, "cuLaunchKernelEx"));
      found.get_context = reinterpret_cast<decltype(found.get_context)>(dlsym(library, "cuCtxGetCurrent"));
      found.set_context = reinterpret_cast<decltype(found.set_context)>(dlsym(library, "cuCtxSetCurrent"));
    }
    return found;
  }();
  return driver.launch && driver.get_context && driver.set_context ? &driver : nullptr;
}

}  // namespace

// The size of the record's header: launcher.py compares it before it trusts the library.
AQ_EXPORT uint32_t aq_launch_header_size() { return sizeof(Launch); }

// Launches; returns the driver's result. The context of the calling thread is as before when it returns.
AQ_EXPORT Result aq_launch(const char* record) {
  const Driver* driver = find_driver();
  if (!driver) return kNotFound;
  const Launch& launch = *reinterpret_cast<const Launch*>(record);
  if (launch.num_parameters > kMaxParameters) return kInvalidValue;
  void* parameters[kMaxParameters];
  for (uint32_t i = 0; i < launch.num_parameters; ++i) {
    parameters[i] = const_cast<char*>(record + launch.offsets[i]);
  }
  Attribute attributes[2] = {};
  Config config = {{launch.grid[0], launch.grid[1], launch.grid[2]},
                   {launch.block[0], launch.block[1], launch.block[2]},
                   launch.shared_bytes,
                   launch.stream,
                   attributes,
                   0};
  if (launch.cluster[0]) {
    Attribute& attribute = attributes[config.num_attributes++];
    attribute.id = kClusterDimension;
    for (int i = 0; i < 3; ++i) attribute.value.dimensions[i] = launch.cluster[i];
  }
  if (launch.programmatic) {
    Attribute& attribute = attributes[config.num_attributes++];
    attribute.id = kProgrammaticStreamSerialization;
    attribute.value.flag = 1;
  }
  void* before = nullptr;
  Result result = driver->get_context(&before);
  if (result) return result;
  if (before == launch.context) return driver->launch(&config, launch.function, parameters, nullptr);
  result = driver->set_context(launch.context);
  if (result) return result;
  result = driver->launch(&config, launch.function, parameters, nullptr);
  const Result restored = driver->set_context(before);
  return result ? result : restored;
}
