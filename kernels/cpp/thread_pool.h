// A pool that waits for finished chunks of work, never for workers: a worker that the system has descheduled, or that
// has not woken up yet, costs nothing unless it holds a chunk. (OpenMP's barrier costs 8 ms per call on a busy
// machine.)
#pragma once

#include <cstdint>

namespace fq {

// Calls task(context, chunk) for chunk in 0..num_chunks-1 on at most num_threads threads, the caller being one of them.
// With one thread, or while another caller has the pool, everything runs in the caller.
void parallel_for(int num_threads, uint32_t num_chunks, void (*task)(void* context, uint32_t chunk), void* context);

}  // namespace fq
