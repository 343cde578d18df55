// Memory nodes: who runs which task, on machines of several nodes that are played, and where pages are moved.
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/nodes.h"
#include "cpu/workers.h"
#include "setting.h"

namespace cpu = moe_ext::cpu;
using setting::serial;
using setting::std_threads;

namespace {

// Sets MOE_EXT_NODES while it lives.
class PlayedNodes {
 public:
  explicit PlayedNodes(const std::string& count) { setenv("MOE_EXT_NODES", count.c_str(), 1); }
  ~PlayedNodes() { unsetenv("MOE_EXT_NODES"); }
  PlayedNodes(const PlayedNodes&) = delete;
  PlayedNodes& operator=(const PlayedNodes&) = delete;
};

}  // namespace

TEST("rows are shared out over nodes in order, in parts that differ by one at most") {
  for (const int nodes : {1, 2, 3, 8}) {
    for (const int64_t rows : {8, 13, 4096}) {
      std::vector<int64_t> count(nodes);
      int last = 0;
      for (int64_t row = 0; row < rows; ++row) {
        const int node = cpu::node_of_row(row, rows, nodes);
        CHECK(node >= last && node < nodes, "row ", row, " of ", rows, " on ", node);
        ++count[last = node];
      }
      const auto [least, most] = std::minmax_element(count.begin(), count.end());
      CHECK(*most - *least <= 1, rows, " rows over ", nodes);
    }
  }
}

TEST("every task runs once, on one thread or many, also where a node has none") {
  for (const char* nodes : {"1", "2", "5"}) {
    const PlayedNodes played(nodes);
    CHECK(cpu::node_count() == atoi(nodes), cpu::node_count());
    for (const auto& threads : {serial(4), std_threads(2), std_threads(7)}) {
      for (const int64_t tasks : {0, 1, 3, 200}) {
        std::vector<std::atomic<int>> runs(tasks);
        cpu::for_each_task_by_node(
            threads, threads.count, tasks, [&](int64_t task) { return static_cast<int>(task % 2); },
            [&](int64_t task, int64_t next, int64_t worker) {
              ++runs[task];
              CHECK(next >= -1 && next < tasks && next != task, next, " after ", task);
              CHECK(worker >= 0 && worker < threads.count, worker);
            });
        for (int64_t task = 0; task < tasks; ++task) CHECK(runs[task] == 1, task, " ran ", runs[task].load(), " times");
      }
    }
  }
}

TEST("a thread runs the tasks of its own node first, and knows the next one") {
  const PlayedNodes played("3");
  std::vector<int64_t> ran, announced;
  // The only thread that comes is worker 0, on node 0.
  cpu::for_each_task_by_node(
      serial(3), 3, 60, [](int64_t task) { return 2 - static_cast<int>(task % 3); },
      [&](int64_t task, int64_t next, int64_t) {
        ran.push_back(task);
        announced.push_back(next);
      });
  CHECK(ran.size() == 60, ran.size());
  for (int64_t i = 0; i < 60; ++i) {
    const int64_t node = i / 20;
    CHECK(ran[i] == 3 * (i % 20) + 2 - node, "task ", ran[i], " at ", i);
    if (announced[i] >= 0) CHECK(announced[i] == ran[i + 1], announced[i], " announced before ", ran[i + 1]);
  }
  CHECK(announced[0] == ran[1], announced[0]);
}

TEST("pages are counted, and lie on their nodes once they are moved, where the system moves any") {
  const PlayedNodes played("2");
  constexpr int64_t kMatrices = 3, kRows = 64, kRowBytes = 1000;
  std::vector<char> weights(kMatrices * kRows * kRowBytes, 1);
  for (const auto order : {cpu::RowOrder::kPlain, cpu::RowOrder::kHalves, cpu::RowOrder::kTransposed}) {
    try {
      const cpu::Placed placed = cpu::place_rows(weights.data(), kMatrices, kRows, kRowBytes, order);
      CHECK(placed.bytes > 0 && placed.bytes <= static_cast<int64_t>(weights.size()), placed.bytes);
      CHECK(placed.there == placed.bytes, placed.there, " of ", placed.bytes);
    } catch (const std::runtime_error& error) {
      CHECK(std::string(error.what()).find("the system does not") == 0, error.what());
    }
  }
  CHECK(std::count(weights.begin(), weights.end(), 1) == static_cast<int64_t>(weights.size()), "bytes have changed");
}

TEST("a number of nodes that is none is refused") {
  for (const char* text : {"0", "65", "two", "2x", "-1"}) {
    const PlayedNodes played(text);
    std::string message = "no error";
    try {
      cpu::node_count();
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    CHECK(message == std::string("MOE_EXT_NODES=") + text + "; expected a number from 1 to 64", message);
  }
}
