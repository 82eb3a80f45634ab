// Emulated: caches change no number.
#pragma once

inline uint4 load_once(const uint4* address) { return *address; }
inline uint2 load_once(const uint2* address) { return *address; }
inline uint32_t load_once(const uint32_t* address) { return *address; }
inline uint4 load_from_l2(const uint4* address) { return *address; }
