#include "workspace.h"

#include <atomic>
#include <cstdlib>

namespace fastsae {
namespace {

// A kept block starts with its capacity; one pointer each, so that an exchange hands it over without a lock.
constexpr size_t kHeader = 64;
constexpr int kBlocks = 32;  // nested calls, and threads that each run an operation on their own rows
std::atomic<char*> kept[kBlocks];
std::atomic<size_t> kept_bytes{0};

size_t& capacity_of(char* block) { return *reinterpret_cast<size_t*>(block); }

}  // namespace

Workspace::Workspace(size_t bytes) {
  for (std::atomic<char*>& slot : kept) {
    if (slot.load(std::memory_order_relaxed) == nullptr) continue;
    char* const block = slot.exchange(nullptr, std::memory_order_acq_rel);
    if (block == nullptr) continue;
    kept_bytes.fetch_sub(capacity_of(block), std::memory_order_relaxed);
    if (capacity_of(block) >= bytes) {
      capacity_ = capacity_of(block);
      base_ = block + kHeader;
      return;
    }
    std::free(block);
  }
  // Grows by halves, so that a slowly growing batch does not allocate at each call.
  capacity_ = (bytes + bytes / 2 + 4095) & ~size_t{4095};
  void* fresh = nullptr;
  if (posix_memalign(&fresh, 64, capacity_ + kHeader) != 0) return;
  char* const block = static_cast<char*>(fresh);
  capacity_of(block) = capacity_;
  base_ = block + kHeader;
}

Workspace::~Workspace() {
  if (base_ == nullptr) return;
  char* const block = base_ - kHeader;
  if (kept_bytes.fetch_add(capacity_, std::memory_order_relaxed) + capacity_ <= kKept)
    for (std::atomic<char*>& slot : kept) {
      char* expected = nullptr;
      if (slot.compare_exchange_strong(expected, block, std::memory_order_acq_rel)) return;
    }
  kept_bytes.fetch_sub(capacity_, std::memory_order_relaxed);
  std::free(block);
}

}  // namespace fastsae
