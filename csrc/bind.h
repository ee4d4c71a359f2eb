// C++ functions as Python ones, for both modules. An argument comes as a number, an address, or a tuple of them: the fields of a structure
// in their order. Arguments are checked in fastsae/native.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace fastsae {

template <class T>
constexpr size_t kFields = 0;  // of a structure
#define FASTSAE_FIELDS(Type, count) \
  template <>                       \
  constexpr size_t kFields<Type> = count;

struct Given {
  pybind11::handle object;

  template <class T>
  T as() const {
    if constexpr (kFields<T> > 0)
      return fields<T>(object.cast<pybind11::tuple>(), std::make_index_sequence<kFields<T>>());
    else if constexpr (std::is_pointer_v<T>)
      return reinterpret_cast<T>(object.cast<std::uintptr_t>());
    else if constexpr (std::is_enum_v<T>)
      return static_cast<T>(object.cast<int>());
    else
      return object.cast<T>();
  }
  template <class T>
  operator T() const {
    return as<T>();
  }

 private:
  template <class T, size_t... I>
  static T fields(const pybind11::tuple& from, std::index_sequence<I...>) {
    if (from.size() != sizeof...(I)) throw pybind11::type_error("expected " + std::to_string(sizeof...(I)) + " fields of a structure");
    return {Given{PyTuple_GET_ITEM(from.ptr(), I)}...};
  }
};

template <class R, class... A, size_t... I>
R call(R (*function)(A...), const pybind11::args& given, std::index_sequence<I...>) {
  const std::tuple<std::decay_t<A>...> arguments{Given{PyTuple_GET_ITEM(given.ptr(), I)}.template as<std::decay_t<A>>()...};
  const pybind11::gil_scoped_release release;
  return std::apply(function, arguments);
}

template <class R, class... A>
void def(pybind11::module_& m, const char* name, R (*function)(A...)) {
  m.def(name, [=](const pybind11::args& given) {
    if (given.size() != sizeof...(A))
      throw pybind11::type_error(std::string(name) + ": expected " + std::to_string(sizeof...(A)) + " arguments, got " +
                                 std::to_string(given.size()));
    return call(function, given, std::index_sequence_for<A...>());
  });
}

}  // namespace fastsae
