// The emulator's switches and its guarded memory, for emulator.py (ctypes).
#include "simt.h"

extern "C" {

void simt_configure(int order, bool greedy, bool lazy, unsigned seed, int skip_line, int processors) {
  simt::options = {static_cast<simt::Order>(order), greedy, lazy, seed, skip_line, processors};
}

// `bytes` of 0xFF whose end (or start) is flush with protected memory.
void* simt_allocate(size_t bytes, bool at_end) {
  auto memory = std::make_unique<simt::GuardedMemory>(bytes, at_end);
  void* const data = memory->data();
  simt::buffers[data] = std::move(memory);
  return data;
}

void simt_free_all() { simt::buffers.clear(); }

}  // extern "C"
