// Argument checks whose message is the caller's line alone, without a source path.
#pragma once

#include <sstream>
#include <stdexcept>

namespace dflash {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace dflash
