// Hands numbered tasks to the caller's threads, first come first served. Which thread runs a task is not determined, so
// a task may write only what no other task writes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "moe.h"

namespace moe_ext::cpu {

// Calls task(index, next, worker) for every index < tasks. worker < workers identifies the calling thread's private
// memory. `next` is the task that the same thread will run after this one, so that it can fetch what that needs, or -1
// if none is known: a thread claims its next task early, except at the end, where an idle thread might take it.
template <typename Task>
void for_each_task_ahead(const Threads& threads, int64_t workers, int64_t tasks, const Task& task) {
  workers = std::min(workers, tasks);
  if (workers <= 1) {
    for (int64_t index = 0; index < tasks; ++index) task(index, index + 1 < tasks ? index + 1 : -1, int64_t{0});
    return;
  }
  struct Shared {
    const Task& task;
    int64_t tasks;
    int64_t last_claimed_early;
    std::atomic<int64_t> next_task{0};
    std::atomic<int64_t> next_worker{0};

    void work() {
      const int64_t worker = next_worker.fetch_add(1);
      for (int64_t index = next_task.fetch_add(1), next; index < tasks; index = next) {
        const bool early = index < last_claimed_early;
        if (early) next = next_task.fetch_add(1);
        task(index, early && next < tasks ? next : -1, worker);
        if (!early) next = next_task.fetch_add(1);
      }
    }
  } shared{task, tasks, tasks - 2 * workers};
  threads.run(workers, [](void* context) { static_cast<Shared*>(context)->work(); }, &shared);
}

// Calls task(index, worker) for every index < tasks.
template <typename Task>
void for_each_task(const Threads& threads, int64_t workers, int64_t tasks, const Task& task) {
  for_each_task_ahead(threads, workers, tasks, [&](int64_t index, int64_t, int64_t worker) { task(index, worker); });
}

// Threads worth waking for `work` multiply-adds (or elements): below about 10 microseconds each, waking costs more.
inline int64_t workers_for(const Threads& threads, int64_t work, int64_t work_per_worker) {
  return std::clamp(work / work_per_worker, int64_t{1}, threads.count);
}

}  // namespace moe_ext::cpu
