// Emulated: caches change no number.
#pragma once

inline uint4 load_once(const uint4* address) { return *address; }
inline uint4 load_from_l2(const uint4* address) { return *address; }
