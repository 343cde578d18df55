// Tests without a framework. A test program is one .cpp that includes this header, which also holds main():
//   TEST("two and two make four") { CHECK(2 + 2 == 4, "got ", 2 + 2); }
// A failed CHECK ends its test with the condition, the place and the values given; the other tests still run. The
// program's argument, if it is given one, chooses the tests whose sentence has it.
#pragma once

#include <chrono>
#include <cstdio>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* sentence;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* sentence, void (*body)()) { tests().push_back({sentence, body}); }
};

// Thrown by a test that cannot run here; the program's exit status is then 77 unless a test failed.
struct Skip : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Values>
[[noreturn]] void fail(const char* condition, const char* file, int line, const Values&... values) {
  std::ostringstream text;
  text.precision(9);
  text << file << ":" << line << ": " << condition << " ";
  (text << ... << values);
  throw std::runtime_error(text.str());
}

}  // namespace check

#define CHECK_JOIN_(a, b) a##b
#define CHECK_JOIN(a, b) CHECK_JOIN_(a, b)
#define TEST(sentence)                                                                                          \
  static void CHECK_JOIN(test_, __LINE__)();                                                                    \
  static const check::Registration CHECK_JOIN(registration_, __LINE__)(sentence, &CHECK_JOIN(test_, __LINE__)); \
  static void CHECK_JOIN(test_, __LINE__)()
#define CHECK(condition, ...)                                                   \
  do {                                                                          \
    if (!(condition)) check::fail(#condition, __FILE__, __LINE__, __VA_ARGS__); \
  } while (false)

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  int run = 0, failed = 0, skipped = 0;
  for (const check::Test& test : check::tests()) {
    if (std::string(test.sentence).find(wanted) == std::string::npos) continue;
    ++run;
    const auto start = std::chrono::steady_clock::now();
    std::string problem;
    try {
      test.body();
    } catch (const check::Skip& reason) {
      std::printf("skip           %s (%s)\n", test.sentence, reason.what());
      ++skipped;
      continue;
    } catch (const std::exception& error) {
      problem = error.what();
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%-4s %6.2f s  %s\n", problem.empty() ? "ok" : "FAIL", seconds, test.sentence);
    if (!problem.empty()) std::printf("     %s\n", problem.c_str());
    failed += !problem.empty();
  }
  std::printf("%d tests, %d failed, %d skipped\n", run, failed, skipped);
  return failed > 0 ? 1 : skipped > 0 ? 77 : 0;
}
