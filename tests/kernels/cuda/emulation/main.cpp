// The emulated kernel ENTRY of SOURCE behind a C function.
#include "device.h"

#include SOURCE

template <typename... Parameters, size_t... Indices>
void launch_packed(void (*kernel)(Parameters...), void** args, Index grid, unsigned num_threads, size_t shared_bytes,
                   std::index_sequence<Indices...>) {
  launch(grid, num_threads, shared_bytes,
         [&] { kernel(*static_cast<std::remove_const_t<Parameters>*>(args[Indices])...); });
}

template <typename... Parameters>
void launch_packed(void (*kernel)(Parameters...), void** args, Index grid, unsigned num_threads, size_t shared_bytes) {
  launch_packed(kernel, args, grid, num_threads, shared_bytes, std::index_sequence_for<Parameters...>());
}

extern "C" void run(void** args, unsigned x, unsigned y, unsigned z, unsigned num_threads, size_t shared_bytes) {
  launch_packed(ENTRY, args, {x, y, z}, num_threads, shared_bytes);
}
