// A crew: the calling thread and its helpers, who work through a step's phases unit by unit.
//
// A phase begins when every unit of the phase before it is done. Threads take units one at a time, so a phase waits for
// units and never for threads: a helper that the operating system has put aside holds up nobody unless it is in the
// middle of a unit. That is what keeps a step fast on cores that others use too.
//
// The word that hands out a phase's units carries the number of the job, so a helper that wakes up late finds that the
// job is over, and takes nothing. (A job's number comes round again after 2^24 jobs.)
//
// A crew can do without helpers of its own: where others have a team of threads in the same process, both would spin on
// the same cores by turns. It then works in the threads of that team (see Team).
#pragma once

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "amx.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headwater {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// One phase of a job: `run(context, argument, unit, thread)` for every unit below num_units, in any order, at once.
struct Phase {
  void (*run)(void* context, int argument, int unit, int thread);
  int argument;
  int num_units;
};

// Hands out the units of one phase. All three numbers are in one word, so that they change together.
class alignas(64) Turnstile {
 public:
  static constexpr int kMaxUnits = (1 << 20) - 1;
  enum : int { kAllTaken = -1, kJobIsOver = -2 };

  void open(const Phase& phase, uint32_t job) {
    if (phase.num_units > kMaxUnits) throw std::length_error("a step has too many units; lower the step's tokens");
    phase_ = phase;
    const uint64_t word = tag(job) | uint64_t(phase.num_units) << 20;
    num_done_.store(word, std::memory_order_relaxed);
    next_.store(word, std::memory_order_release);
  }

  // A unit of this job, kAllTaken, or kJobIsOver. Until done() is called for it the job cannot end.
  int take(uint32_t job) {
    uint64_t seen = next_.load(std::memory_order_acquire);
    for (;;) {
      if ((seen & kTag) != tag(job)) return kJobIsOver;
      if (count(seen) == total(seen)) return kAllTaken;
      if (next_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire))
        return count(seen);
    }
  }

  const Phase& phase() const { return phase_; }  // stable while a unit is taken and not done

  void done() { num_done_.fetch_add(1, std::memory_order_acq_rel); }

  bool is_finished(uint32_t job) const {
    const uint64_t seen = num_done_.load(std::memory_order_acquire);
    return (seen & kTag) != tag(job) || count(seen) == total(seen);
  }

 private:
  static constexpr uint64_t kTag = ~uint64_t(0) << 40;
  static uint64_t tag(uint32_t job) { return uint64_t(job) << 40; }
  static int total(uint64_t word) { return int(word >> 20 & kMaxUnits); }
  static int count(uint64_t word) { return int(word & kMaxUnits); }

  std::atomic<uint64_t> next_{0};      // job, units in all, units taken
  std::atomic<uint64_t> num_done_{0};  // job, units in all, units done
  Phase phase_{};
};

// Calls run(argument) in each of a team's threads, the caller's among them, and returns when all have returned. It may
// have fewer threads than it is asked for. OpenMP's GOMP_parallel is one; flags are 0.
using Team = void (*)(void (*run)(void*), void* argument, unsigned num_threads, unsigned flags);

class Crew {
 public:
  // team: null for helpers of its own.
  Crew(int num_threads, int max_phases, Team team = nullptr)
      : num_threads_(num_threads), team_(team), turnstiles_(max_phases), seconds_(max_phases) {
    for (int i = 1; i < num_threads && team == nullptr; i++) helpers_.emplace_back([this, i] { help(i); });
  }

  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  ~Crew() {
    is_stopping_.store(true);
    job_.fetch_add(1);
    job_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  int num_threads() const { return num_threads_; }

  // Of the last job: how long the caller was in a phase, waiting included.
  double seconds(int phase) const { return seconds_[phase]; }

  // Runs a job to its end. From one thread at a time; at most max_phases phases.
  void run(const std::vector<Phase>& phases, void* context) {
    const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    for (size_t i = 0; i < phases.size(); i++) turnstiles_[i].open(phases[i], job);
    num_phases_.store(int(phases.size()), std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    const auto began = Clock::now();
    job_.store(job);
    if (team_ != nullptr) {
      Shift shift{*this, job, began};
      team_(Shift::join, &shift, unsigned(num_threads_), 0);
      return;
    }
    if (num_asleep_.load() > 0) job_.notify_all();
    work(job, 0, began);
  }

 private:
  static constexpr int kSpinsBeforeSleep = 20000;  // some 0.3 ms: longer than a busy engine's pause between two steps
  static constexpr int kSpinsBeforeYield = 2000;

  using Clock = std::chrono::steady_clock;

  // A job in the threads of a team, who number themselves as they come.
  struct Shift {
    Crew& crew;
    uint32_t job;
    Clock::time_point began;
    std::atomic<int> num_joined{0};

    static void join(void* self) {
      Shift& shift = *static_cast<Shift*>(self);
      const int thread = shift.num_joined.fetch_add(1);
      if (thread < shift.crew.num_threads_) shift.crew.work(shift.job, thread, shift.began);
    }
  };

  void work(uint32_t job, int thread, Clock::time_point began) {
    configure_tiles();
    const int num_phases = num_phases_.load(std::memory_order_relaxed);
    for (int i = 0; i < num_phases; i++) {
      if (!work_through(turnstiles_[i], job, thread)) return;
      if (thread > 0) continue;
      const auto now = Clock::now();
      seconds_[i] = std::chrono::duration<double>(now - began).count();
      began = now;
    }
  }

  // False where the job is over.
  bool work_through(Turnstile& turnstile, uint32_t job, int thread) {
    for (int unit; (unit = turnstile.take(job)) != Turnstile::kAllTaken;) {
      if (unit == Turnstile::kJobIsOver) return false;
      const Phase& phase = turnstile.phase();
      phase.run(context_.load(std::memory_order_relaxed), phase.argument, unit, thread);
      turnstile.done();
    }
    for (int spins = 0; !turnstile.is_finished(job); spins++) {
      if (spins < kSpinsBeforeYield)
        relax();
      else
        std::this_thread::yield();
    }
    return true;
  }

  void help(int thread) {
    uint32_t seen = 0;
    while (!is_stopping_.load()) {
      for (int spins = 0; job_.load(std::memory_order_acquire) == seen; spins++) {
        if (spins < kSpinsBeforeSleep) {
          relax();
          continue;
        }
        num_asleep_.fetch_add(1);
        job_.wait(seen);
        num_asleep_.fetch_sub(1);
      }
      seen = job_.load(std::memory_order_acquire);
      if (!is_stopping_.load()) work(seen, thread, {});
    }
  }

  const int num_threads_;
  const Team team_;
  std::vector<Turnstile> turnstiles_;
  std::vector<double> seconds_;  // by phase; written by the caller alone
  std::atomic<int> num_phases_{0};
  std::atomic<void*> context_{nullptr};
  std::atomic<uint32_t> job_{0};
  std::atomic<int> num_asleep_{0};
  std::atomic<bool> is_stopping_{false};
  std::vector<std::thread> helpers_;  // last: the threads use what stands above
};

}  // namespace headwater
