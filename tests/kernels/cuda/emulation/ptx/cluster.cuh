// Emulated: clusters of one block.
#pragma once

inline unsigned cluster_rank() { return 0; }
inline void cluster_arrive() {}
inline void cluster_arrive_relaxed() {}
inline void cluster_wait() {}
inline unsigned cluster_map(unsigned address, unsigned) { return address; }
inline float4 cluster_load_float4(unsigned mapped) { return *reinterpret_cast<float4*>(shared_base() + mapped); }
