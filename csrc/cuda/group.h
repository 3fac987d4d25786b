// A group: the blocks that share a sample's tile of channels, and how they add up their sums.
#pragma once

#include "call.h"

namespace eca::cuda {

// This block's number in the order in which blocks start. A block waits only for blocks of its own
// group, which have started or are the next to start. So nothing waits for ever on a GPU that has
// room for one group.
inline __device__ int start_order(const Tiling& t, const Counters& counters,
                                  Shared<uint32_t> flag) {
  if (t.exchange != Exchange::kGlobal) return int(block_index());
  if (thread_index() == 0) {
    const uint32_t order = fetch_add(counters.ticket(), 1);
    if (order == uint32_t(block_count() - 1)) put(counters.ticket(), 0u);
    flag.set(0, order);
  }
  block_barrier();
  return int(flag.get(0));
}

template <class A>
class Group {
 public:
  // Divisions are of 32 bits: with 64 they would take longer than all else before the first copy.
  __device__ Group(const Tiling& t, int order, const Workspace& work)
      : exchange_(t.exchange), size_(t.group), held_(t.held), unit_(order / t.group),
        rank_(order - unit_ * t.group), counter_(work.counters.group(unit_)),
        sums_(static_cast<A*>(work.sums) + int64_t(order - rank_) * t.held),
        sample_(unit_ / int(t.tiles)), tile_(unit_ - sample_ * int(t.tiles)) {}

  __device__ int rank() const { return rank_; }
  __device__ int sample() const { return sample_; }
  __device__ int tile() const { return tile_; }

  // Shows `sums` to the blocks of the group; afterwards total() adds theirs. By all threads.
  __device__ void exchange(Shared<A> sums, int count) {
    if (exchange_ == Exchange::kNone) block_barrier();
    if (exchange_ == Exchange::kCluster) {
      cluster_arrive();
      cluster_wait();
    }
    if (exchange_ != Exchange::kGlobal) return;
    block_barrier();
    for (int h = thread_index(); h < count; h += thread_count())
      put(sums_ + rank_ * held_ + h, sums.get(h));
    block_barrier();
    if (thread_index() == 0) {
      fetch_add(counter_, 1);
      while ((load_acquire(counter_) & kArrived) < uint32_t(size_)) pause();
    }
    block_barrier();
  }

  // Adds in the order of the ranks: the same bits in every block and every run.
  __device__ A total(Shared<A> sums, int h) const {
    if (exchange_ == Exchange::kNone) return sums.get(h);
    A total = 0;
    for (int rank = 0; rank < size_; ++rank)
      total += exchange_ == Exchange::kCluster ? sums.get_from_rank(rank, h)
                                               : load_from_other_block(sums_ + rank * held_ + h);
    return total;
  }

  // This block reads no more totals. By all threads.
  __device__ void done_reading() {
    if (exchange_ == Exchange::kCluster) cluster_arrive();
    if (exchange_ != Exchange::kGlobal) return;
    block_barrier();
    if (thread_index() == 0 && fetch_add(counter_, kLeft) / kLeft + 1 == uint32_t(size_))
      put(counter_, 0u);
  }

  // Waits until the others read no more of this block's sums, so that it may end. By all threads.
  __device__ void finish() const {
    if (exchange_ == Exchange::kCluster) cluster_wait();
  }

 private:
  // A counter's halves: how many blocks have written their sums, and how many have read them all.
  static constexpr uint32_t kLeft = 1 << 16, kArrived = kLeft - 1;

  Exchange exchange_;
  int size_, held_, unit_, rank_;
  uint32_t* counter_;
  A* sums_;
  int sample_, tile_;
};

}  // namespace eca::cuda
