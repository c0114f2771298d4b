// Tasks on torch's own threads, each thread with scratch memory of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <memory>

namespace vlmo_kernels {

// Memory of the calling thread that lives as long as it does: fresh memory would fault its pages in at every call. One
// piece for every `Use`.
template <class Use>
char* kept_memory(size_t bytes) {
  thread_local std::unique_ptr<char, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset(static_cast<char*>(std::aligned_alloc(4096, bytes)));
    size = memory ? bytes : 0;
    STD_TORCH_CHECK(memory, "vlmo_kernels: out of memory, ", bytes, " bytes of scratch");
  }
  return memory.get();
}

struct Scratch;  // of a run of tasks

// Threads take the next task when they have done one. Which thread does a task changes nothing in its result.
template <class Kernel>
void run_tasks(int64_t tasks, size_t scratch_bytes, Kernel kernel) {
  if (tasks == 0) return;
  const int64_t available = torch::stable::get_num_threads(), threads = tasks < available ? tasks : available;
  const size_t bytes = (scratch_bytes + 4095) / 4096 * 4096;  // threads do not share a page
  char* scratch = kept_memory<Scratch>(bytes * threads);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        kernel(task, scratch + bytes * thread);
      }
    }
  });
}

}  // namespace vlmo_kernels
