// Hands numbered tasks to the caller's threads, first come first served. Which thread runs a task is not determined, so
// a task may write only what no other task writes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "moe.h"

namespace moe_ext::cpu {

// Calls task(index, worker) for every index < tasks; worker < workers identifies the calling thread's private memory.
template <typename Task>
void for_each_task(const Threads& threads, int64_t workers, int64_t tasks, const Task& task) {
  workers = std::min(workers, tasks);
  if (workers <= 1) {
    for (int64_t index = 0; index < tasks; ++index) task(index, int64_t{0});
    return;
  }
  struct Shared {
    const Task& task;
    int64_t tasks;
    std::atomic<int64_t> next_task{0};
    std::atomic<int64_t> next_worker{0};
  } shared{task, tasks};
  threads.run(
      workers,
      [](void* context) {
        Shared& s = *static_cast<Shared*>(context);
        const int64_t worker = s.next_worker.fetch_add(1);
        for (int64_t index; (index = s.next_task.fetch_add(1)) < s.tasks;) s.task(index, worker);
      },
      &shared);
}

// Threads worth waking for `work` multiply-adds (or elements): below about 10 microseconds each, waking costs more.
inline int64_t workers_for(const Threads& threads, int64_t work, int64_t work_per_worker) {
  return std::clamp(work / work_per_worker, int64_t{1}, threads.count);
}

}  // namespace moe_ext::cpu
