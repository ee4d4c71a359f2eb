// Scratch memory of one call. Fresh pages cost about ten times as much as warm ones, so a few blocks are kept for the next calls (up to
// kKept bytes in all). A call that finds none that is free and large enough allocates its own.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastsae {

class Workspace {
 public:
  static constexpr size_t kKept = size_t{96} << 20;

  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  bool ok() const { return base_ != nullptr; }

  // The next `count` elements, aligned to a cache line. The caller has asked for size<T>(count) of each in the constructor.
  template <class T>
  T* take(int64_t count) {
    T* const block = reinterpret_cast<T*>(base_ + used_);
    used_ += size<T>(count);
    return block;
  }

  template <class T>
  static size_t size(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) & ~size_t{63};
  }

 private:
  char* base_ = nullptr;
  size_t capacity_ = 0, used_ = 0;
};

}  // namespace fastsae
