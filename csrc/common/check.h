// Argument checks whose message is the caller's line alone, without a source path.
#pragma once

#include <concepts>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>

namespace dflash {

// The parts of a message as text. Streams would do the same, but they need the locale of the C++ library, of which a
// process has two where a toolchain links it statically into this library.
inline std::string to_text(std::string_view part) { return std::string(part); }
inline std::string to_text(std::integral auto part) { return std::to_string(part); }
inline std::string to_text(double part) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", part);
  return text;
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error((std::string() + ... + to_text(parts)));
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace dflash
