// Hands numbered tasks to the caller's threads, first come first served. Which thread runs a task is not determined, so
// a task may write only what no other task writes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/nodes.h"
#include "moe.h"

namespace moe_ext::cpu {

// Tasks [next, end), handed out one by one.
struct TaskQueue {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
  int64_t claimed_early = 0;  // of the tasks before this one the thread claims the one after

  void set(int64_t first, int64_t last, int64_t workers) {
    next = first;
    end = last;
    claimed_early = last - 2 * workers;
  }
  // Calls task(index, next) for what is left.
  template <typename Task>
  void drain(const Task& task) {
    for (int64_t index = next.fetch_add(1), following = end; index < end; index = following) {
      const bool early = index < claimed_early;
      if (early) following = next.fetch_add(1);
      task(index, early && following < end ? following : -1);
      if (!early) following = next.fetch_add(1);
    }
  }
};

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
    TaskQueue queue{};
    std::atomic<int64_t> next_worker{0};

    void work() {
      const int64_t worker = next_worker.fetch_add(1);
      queue.drain([&](int64_t index, int64_t next) { task(index, next, worker); });
    }
  } shared{task};
  shared.queue.set(0, tasks, workers);
  threads.run(workers, [](void* context) { static_cast<Shared*>(context)->work(); }, &shared);
}

// The same where tasks read weights that lie on memory nodes: a thread runs those of its own node first, then the
// others'. node_of(index) is the node of a task.
template <typename NodeOf, typename Task>
void for_each_task_by_node(const Threads& threads, int64_t workers, int64_t tasks, const NodeOf& node_of,
                           const Task& task) {
  const int nodes = node_count();
  workers = std::min(workers, tasks);
  if (nodes == 1 || workers <= 1) return for_each_task_ahead(threads, workers, tasks, task);
  std::vector<int64_t> order;  // tasks, node by node
  order.reserve(tasks);
  struct Shared {
    const Task& task;
    const std::vector<int64_t>& order;
    int nodes;
    TaskQueue queues[kMostNodes]{};
    std::atomic<int64_t> next_worker{0};

    void work() {
      const int64_t worker = next_worker.fetch_add(1);
      const int own = node_of_thread(worker);
      for (int i = 0; i < nodes; ++i) {
        queues[(own + i) % nodes].drain(
            [&](int64_t at, int64_t next) { task(order[at], next < 0 ? -1 : order[next], worker); });
      }
    }
  } shared{task, order, nodes};
  for (int node = 0; node < nodes; ++node) {
    const auto first = static_cast<int64_t>(order.size());
    for (int64_t index = 0; index < tasks; ++index) {
      if (node_of(index) == node) order.push_back(index);
    }
    shared.queues[node].set(first, static_cast<int64_t>(order.size()), workers);
  }
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
