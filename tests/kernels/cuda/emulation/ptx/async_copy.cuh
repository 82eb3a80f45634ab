// Emulated: a copy arrives when its group is waited for, so that reading too early gives what was there before.
#pragma once

struct PendingCopy {
  unsigned char* target;
  std::vector<unsigned char> bytes;
};
inline std::vector<std::vector<std::vector<PendingCopy>>> pending_copies;  // [thread][group][copy], the last group open

inline std::vector<std::vector<PendingCopy>>& own_copies() {
  if (pending_copies.size() <= block.current) pending_copies.resize(block.current + 1);
  auto& groups = pending_copies[block.current];
  if (groups.empty()) groups.resize(1);
  return groups;
}

template <int BYTES, int LINE = 0>
inline void copy_async(void* shared, const void* source, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async can move");
  if (reinterpret_cast<uintptr_t>(shared) % BYTES || reinterpret_cast<uintptr_t>(source) % BYTES) {
    std::fprintf(stderr, "a copy of %d bytes is not aligned\n", BYTES);
    std::abort();
  }
  std::vector<unsigned char> bytes(BYTES, 0);
  if (valid) std::memcpy(bytes.data(), source, BYTES);
  own_copies().back().push_back({static_cast<unsigned char*>(shared), bytes});
}

inline void copy_async_commit() { own_copies().emplace_back(); }

template <int PENDING>
inline void copy_async_wait() {
  auto& groups = own_copies();
  while (groups.size() > PENDING + 1) {
    for (const auto& copy : groups.front()) std::memcpy(copy.target, copy.bytes.data(), copy.bytes.size());
    groups.erase(groups.begin());
  }
}
