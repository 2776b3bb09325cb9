// Which masked positions of a canvas to commit, on the CPU. The best positions are popped from a heap as long as the
// rule accepts them.
#include "sample/logits.h"
#include "sample/select.h"

namespace dflash::DFLASH_ISA {

// A heap of positions. The highest score is on top, and the leftmost of equal scores. NaN counts as -inf.
template <class Real>
class Heap {
 public:
  Heap(const Real* scores, int64_t* positions, int64_t count) : scores_(scores), positions_(positions), count_(count) {
    for (int64_t i = count / 2 - 1; i >= 0; --i) sink(i);
  }

  int64_t count() const { return count_; }

  int64_t pop() {
    const int64_t best = positions_[0];
    positions_[0] = positions_[--count_];
    sink(0);
    return best;
  }

 private:
  bool precedes(int64_t a, int64_t b) const {
    const Real x = score(a), y = score(b);
    return x == y ? a < b : x > y;
  }

  Real score(int64_t position) const { return scores_ ? larger(scores_[position], Real(-kInfinity)) : Real(0); }

  void sink(int64_t i) {
    for (int64_t child = 2 * i + 1; child < count_; child = 2 * i + 1) {
      if (child + 1 < count_ && precedes(positions_[child + 1], positions_[child])) ++child;
      if (!precedes(positions_[child], positions_[i])) return;
      const int64_t position = positions_[i];
      positions_[i] = positions_[child];
      positions_[child] = position;
      i = child;
    }
  }

  const Real* scores_;
  int64_t* positions_;
  int64_t count_;
};

template <class Real>
static void reveal_row(const RevealParams& p, int64_t row, int64_t* positions) {
  const auto of_row = [&](const void* tensor) {
    return tensor ? static_cast<const Real*>(tensor) + row * p.length : nullptr;
  };
  const Real *scores = of_row(p.scores), *entropy = of_row(p.entropy);
  const Real limit = value_of<Real>(p.limit, row);
  const bool* masked = p.masked + row * p.length;
  bool* revealed = p.revealed + row * p.length;

  int64_t count = 0;
  for (int64_t i = 0; i < p.length; ++i) {
    revealed[i] = false;
    if (masked[i]) positions[count++] = i;
  }
  Heap<Real> heap(scores, positions, count);
  double entropies = 0, largest = 0;
  for (int64_t nth = 1; heap.count() > 0; ++nth) {
    const int64_t position = heap.pop();
    bool takes = nth == 1;  // the first is always taken, so that every step makes progress
    switch (p.rule) {
      case Reveal::kCount: takes = nth <= limit; break;
      case Reveal::kThreshold: takes |= scores[position] > limit; break;
      case Reveal::kAtLeast: takes |= scores[position] >= limit; break;
      case Reveal::kFactor: takes |= scores[position] >= 1 - limit / (nth + 1); break;
      case Reveal::kEntropyBound:
        entropies += entropy[position];
        largest = entropy[position] > largest ? entropy[position] : largest;
        takes |= entropies - largest <= limit;
        break;
    }
    if (!takes) return;
    revealed[position] = true;
  }
}

void reveal(const RevealParams& params, int64_t begin, int64_t end) {
  const Array<int64_t> positions(params.length);
  for (int64_t row = begin; row < end; ++row) {
    params.is_double ? reveal_row<double>(params, row, positions.data()) : reveal_row<float>(params, row, positions.data());
  }
}

}  // namespace dflash::DFLASH_ISA
