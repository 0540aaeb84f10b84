// The threads of this library: they spin for a moment, then sleep, and a stage ends when all its chunks are counted.
#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fq {
namespace {

// Decoding issues the next product some microseconds after the last: a worker that sleeps at once would pay a wake-up
// for each, one that spins for long would steal the core from everything else.
constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr int kSpinsPerClockRead = 64;
constexpr int kMaxWorkers = 255;

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

class Pool {
  public:
    void run(int num_threads, uint32_t num_chunks, void (*task)(void*, uint32_t), void* context) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner.owns_lock()) {
            for (uint32_t chunk = 0; chunk < num_chunks; ++chunk) task(context, chunk);
            return;
        }
        start_workers(num_threads - 1);
        task_ = task;
        context_ = context;
        num_chunks_ = num_chunks;
        finished_.store(0, std::memory_order_relaxed);
        active_workers_.store(num_threads - 1, std::memory_order_relaxed);
        ++generation_;
        ticket_.store(generation_ << 32 | num_chunks);
        if (num_sleeping_.load() > 0) {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            wake_.notify_all();
        }
        work();
        for (int spins = 0; finished_.load(std::memory_order_acquire) < num_chunks; ++spins) {
            if (spins < 2000) relax();
            else std::this_thread::yield();  // a worker lost its core while holding a chunk: perhaps to this thread
        }
    }

  private:
    // Takes chunks until none is left. The ticket is (generation, chunks left): while a chunk of a generation is left
    // or held the caller cannot post the next job, so the job may be read once, and only once, a claim has succeeded.
    void work() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (static_cast<uint32_t>(ticket) > 0) {
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
            task_(context_, num_chunks_ - static_cast<uint32_t>(ticket));
            finished_.fetch_add(1, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void start_workers(int count) {
        try {
            for (; num_workers_ < count && num_workers_ < kMaxWorkers; ++num_workers_) {
                // Detached and never joined: at process exit there is nothing to tear down in the wrong order.
                std::thread(&Pool::worker_loop, this, num_workers_).detach();
            }
        } catch (const std::system_error&) {
            // The system allows no more threads. Those there are, the caller at least, do the work.
        }
    }

    bool has_work(int index) const {
        return static_cast<uint32_t>(ticket_.load()) > 0 && index < active_workers_.load(std::memory_order_relaxed);
    }

    void worker_loop(int index) {
        while (true) {
            const auto sleep_at = std::chrono::steady_clock::now() + kSpinTime;
            for (int spins = 0; !has_work(index); ++spins) {
                relax();
                if (spins % kSpinsPerClockRead == 0 && std::chrono::steady_clock::now() > sleep_at) {
                    std::unique_lock<std::mutex> lock(sleep_mutex_);
                    num_sleeping_.fetch_add(1);  // before the last look at the ticket, or a job could be missed
                    wake_.wait(lock, [&] { return has_work(index); });
                    num_sleeping_.fetch_sub(1);
                }
            }
            work();
        }
    }

    std::mutex owner_;
    int num_workers_ = 0;
    uint64_t generation_ = 0;
    void (*task_)(void*, uint32_t) = nullptr;
    void* context_ = nullptr;
    uint32_t num_chunks_ = 0;
    std::atomic<int> active_workers_{0};
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
    std::atomic<int> num_sleeping_{0};
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> finished_{0};
};

std::atomic<Pool*> shared_pool{nullptr};

Pool& pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        shared_pool.store(new Pool);
        // A forked child has none of the workers and perhaps a locked mutex: it starts again with a pool of its own.
        pthread_atfork(nullptr, nullptr, [] { shared_pool.store(new Pool); });
    });
    return *shared_pool.load();
}

}  // namespace

void parallel_for(int num_threads, uint32_t num_chunks, void (*task)(void*, uint32_t), void* context) {
    if (num_threads <= 1 || num_chunks <= 1) {
        for (uint32_t chunk = 0; chunk < num_chunks; ++chunk) task(context, chunk);
        return;
    }
    pool().run(num_threads, num_chunks, task, context);
}

}  // namespace fq
