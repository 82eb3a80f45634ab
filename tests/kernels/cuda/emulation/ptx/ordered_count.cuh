// Emulated: blocks run one after another.
#pragma once

inline int count_ordered(int* counter) { return atomicAdd(counter, 1); }
