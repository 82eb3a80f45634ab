// Emulated: clusters of one block.
#pragma once

inline unsigned cluster_rank() { return 0; }
inline void cluster_arrive() {}
inline void cluster_arrive_relaxed() {}
inline void cluster_wait() {}
inline unsigned cluster_map(unsigned address, unsigned) { return address; }
inline void cluster_copy(unsigned, unsigned, unsigned, unsigned) {}
