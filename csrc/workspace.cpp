#include "workspace.h"

#include <atomic>
#include <cstdlib>

namespace fastsae {
namespace {

// The kept block starts with its capacity; one pointer, so that an exchange hands it over without a lock.
constexpr size_t kHeader = 64;
std::atomic<char*> kept{nullptr};

}  // namespace

Workspace::Workspace(size_t bytes) {
  char* block = kept.exchange(nullptr, std::memory_order_acq_rel);
  if (block != nullptr) {
    capacity_ = *reinterpret_cast<size_t*>(block);
    if (capacity_ < bytes) {
      std::free(block);
      block = nullptr;
    }
  }
  if (block == nullptr) {
    // Grows by halves, so that a slowly growing batch does not allocate at each call.
    capacity_ = (bytes + bytes / 2 + 4095) & ~size_t{4095};
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 64, capacity_ + kHeader) != 0) return;
    block = static_cast<char*>(fresh);
    *reinterpret_cast<size_t*>(block) = capacity_;
  }
  base_ = block + kHeader;
}

Workspace::~Workspace() {
  if (base_ == nullptr) return;
  char* const block = base_ - kHeader;
  char* expected = nullptr;
  if (capacity_ > kKept || !kept.compare_exchange_strong(expected, block, std::memory_order_acq_rel)) std::free(block);
}

}  // namespace fastsae
