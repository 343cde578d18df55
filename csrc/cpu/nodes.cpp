// Memory nodes by Linux' own calls, without libnuma; elsewhere there is one node.
#include "cpu/nodes.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe_ext::cpu {
namespace {

struct Nodes {
  std::vector<int> of_system;  // the system's number of each
  bool played = false;         // MOE_EXT_NODES: threads are on them in turn
};

#if defined(__linux__)

// Whether one of a node's processors is among those that this process may run on. A list is like "0-3,8".
bool runs_on(int node, const cpu_set_t& allowed) {
  std::ifstream file("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist");
  for (std::string part; std::getline(file, part, ',');) {
    const char* text = part.c_str();
    char* end = nullptr;
    const long first = std::strtol(text, &end, 10);
    if (end == text) break;  // a node without processors
    const long last = *end == '-' ? std::strtol(end + 1, nullptr, 10) : first;
    for (long processor = first; processor <= last && processor < CPU_SETSIZE; ++processor) {
      if (CPU_ISSET(processor, &allowed)) return true;
    }
  }
  return false;
}

std::vector<int> usable_nodes() {
  constexpr unsigned long kMemsAllowed = 4;  // MPOL_F_MEMS_ALLOWED
  unsigned long memory[16] = {};             // the kernel refuses fewer bits than it has nodes, 1024 at most
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (syscall(SYS_get_mempolicy, nullptr, memory, sizeof(memory) * 8, nullptr, kMemsAllowed) != 0) return {};
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return {};
  std::vector<int> found;
  for (int node = 0; node < kMostNodes; ++node) {
    if ((memory[0] >> node & 1) != 0 && runs_on(node, allowed)) found.push_back(node);
  }
  return found;
}

#else

std::vector<int> usable_nodes() { return {}; }

#endif

const Nodes& nodes() {
  static const Nodes usable{usable_nodes()};
  const char* text = std::getenv("MOE_EXT_NODES");
  if (text == nullptr || *text == '\0') return usable;
  thread_local Nodes played{{}, true};
  char* end = nullptr;
  const long count = std::strtol(text, &end, 10);
  if (*end != '\0' || count < 1 || count > kMostNodes) {
    throw std::runtime_error(std::string("MOE_EXT_NODES=") + text + "; expected a number from 1 to 64");
  }
  played.of_system.resize(count);
  for (long i = 0; i < count; ++i) {
    played.of_system[i] = usable.of_system.empty() ? 0 : usable.of_system[i % usable.of_system.size()];
  }
  return played;
}

}  // namespace

int node_count() { return std::max<int>(1, static_cast<int>(nodes().of_system.size())); }

int node_of_thread(int64_t worker) {
  const Nodes& all = nodes();
  const int count = node_count();
  if (all.played) return static_cast<int>(worker % count);
#if defined(__linux__)
  unsigned processor = 0, node = 0;
  if (count > 1 && syscall(SYS_getcpu, &processor, &node, nullptr) == 0) {
    const auto found = std::find(all.of_system.begin(), all.of_system.end(), static_cast<int>(node));
    if (found != all.of_system.end()) return static_cast<int>(found - all.of_system.begin());
  }
#endif
  return 0;
}

#if defined(__linux__)

Placed place_rows(void* first, int64_t matrices, int64_t rows, int64_t row_bytes, RowOrder order) {
  constexpr int kMove = 2;  // MPOL_MF_MOVE
  constexpr int64_t kPagesAtOnce = 1 << 14;
  const std::vector<int> targets = nodes().of_system;
  const int64_t page_bytes = sysconf(_SC_PAGESIZE), total = matrices * rows * row_bytes;
  const int64_t part = order == RowOrder::kHalves ? rows / 2 : rows;
  const auto begin = (reinterpret_cast<uintptr_t>(first) + page_bytes - 1) / page_bytes * page_bytes;
  const int64_t skipped = static_cast<int64_t>(begin - reinterpret_cast<uintptr_t>(first));
  const int64_t pages = std::max<int64_t>(0, (total - skipped) / page_bytes);
  if (targets.empty()) throw std::runtime_error("the system does not say on which memory nodes this process may run");
  Placed placed{pages * page_bytes, 0};
  std::vector<void*> addresses;
  std::vector<int> wanted, status;
  for (int64_t from = 0; from < pages; from += kPagesAtOnce) {
    const int64_t count = std::min(kPagesAtOnce, pages - from);
    addresses.resize(count);
    wanted.resize(count);
    status.assign(count, -1);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = skipped + (from + i) * page_bytes;
      addresses[i] = static_cast<char*>(first) + at;
      const int64_t row = (at + page_bytes / 2) / row_bytes % rows % part;
      const int count_of_nodes = static_cast<int>(targets.size());
      wanted[i] = targets[order == RowOrder::kTransposed ? (from + i) % count_of_nodes
                                                         : node_of_row(row, part, count_of_nodes)];
    }
    if (syscall(SYS_move_pages, 0, count, addresses.data(), wanted.data(), status.data(), kMove) < 0) {
      throw std::runtime_error(std::string("the system does not move memory between nodes: ") + std::strerror(errno) +
                               " (containers need the capability SYS_NICE)");
    }
    for (int64_t i = 0; i < count; ++i) placed.there += status[i] == wanted[i] ? page_bytes : 0;
  }
  return placed;
}

#else

Placed place_rows(void*, int64_t, int64_t, int64_t, RowOrder) {
  throw std::runtime_error("memory is moved between nodes on Linux only");
}

#endif

}  // namespace moe_ext::cpu
