"""C++: what a network is made of, and the memory of a pass."""

STRUCTURE = r"""
namespace {

// ---- what a network is made of; offsets count in the flat weights and the flat statistics
struct Norm {  // -1 where there is none: of scale and shift, or of the whole norm
  int64_t mean, variance, scale, shift;
  bool exists() const { return mean >= 0; }
};
struct Conv {
  int kernel, dilation;
  bool twice;
  int node;
  int64_t mix, depth1, point1, depth2, point2;
  Norm norm1, norm2;
};
struct Pool {
  bool largest;
  Norm norm;
  std::vector<int> node;
  std::vector<int64_t> mix;
};
struct Halving {
  int64_t even, odd;
  Norm norm;
};
struct Skip {
  int node;
  int64_t mix;
  bool halves;
  Halving halving;
};
struct Source {
  int stride;
  std::vector<Conv> convs;
  std::vector<Pool> pools;
  std::vector<Skip> skips;
};
struct CellPlan {
  int channels;
  bool reduces, halves0;
  int64_t point0, point1;
  Halving halving0;
  Norm norm0, norm1;
  std::vector<Source> sources;
};
struct StemLayer {
  int in, out, stride;
  int64_t weight, scale, shift;
  Norm norm;
};

struct Reader {
  const int64_t* at;
  int64_t next() { return *at++; }
  Norm norm() {
    Norm n;
    n.mean = next();
    n.variance = next();
    n.scale = next();
    n.shift = next();
    return n;
  }
  Halving halving() {
    Halving h;
    h.even = next();
    h.odd = next();
    h.norm = norm();
    return h;
  }
};

struct Plan {
  int channels, height, width, classes, nodes;
  int64_t weights, statistics, classifier, bias;
  std::vector<StemLayer> stem;
  std::vector<CellPlan> cells;

  explicit Plan(const int64_t* table) {
    Reader r{table};
    channels = r.next();
    height = r.next();
    width = r.next();
    classes = r.next();
    nodes = r.next();
    weights = r.next();
    statistics = r.next();
    classifier = r.next();
    bias = r.next();
    stem.resize(r.next());
    for (auto& layer : stem) {
      layer.in = r.next();
      layer.out = r.next();
      layer.stride = r.next();
      layer.weight = r.next();
      layer.scale = r.next();
      layer.shift = r.next();
      layer.norm = r.norm();
    }
    cells.resize(r.next());
    for (auto& cell : cells) {
      cell.channels = r.next();
      cell.reduces = r.next();
      cell.halves0 = r.next();
      if (cell.halves0) cell.halving0 = r.halving();
      else {
        cell.point0 = r.next();
        cell.norm0 = r.norm();
      }
      cell.point1 = r.next();
      cell.norm1 = r.norm();
      cell.sources.resize(nodes + 1);
      for (auto& source : cell.sources) {
        source.stride = r.next();
        source.convs.resize(r.next());
        for (auto& conv : source.convs) {
          conv.kernel = r.next();
          conv.dilation = r.next();
          conv.twice = r.next();
          conv.node = r.next();
          conv.mix = r.next();
          conv.depth1 = r.next();
          conv.point1 = r.next();
          conv.norm1 = r.norm();
          if (conv.twice) {
            conv.depth2 = r.next();
            conv.point2 = r.next();
            conv.norm2 = r.norm();
          }
        }
        source.pools.resize(r.next());
        for (auto& pool : source.pools) {
          pool.largest = r.next();
          pool.norm = r.norm();
          pool.node.resize(r.next());
          pool.mix.resize(pool.node.size());
          for (size_t i = 0; i < pool.node.size(); i++) {
            pool.node[i] = r.next();
            pool.mix[i] = r.next();
          }
        }
        source.skips.resize(r.next());
        for (auto& skip : source.skips) {
          skip.node = r.next();
          skip.mix = r.next();
          skip.halves = r.next();
          if (skip.halves) skip.halving = r.halving();
        }
      }
    }
  }
};

// ---- memory of one pass, taken piece by piece and released in the opposite order; kept for the next pass
struct Arena {
  struct Chunk {
    char* memory;
    size_t size;
  };
  static constexpr int LEAN_PASSES = 32;
  std::vector<Chunk> chunks;
  size_t chunk = 0, used = 0;           // where the next piece begins
  size_t taken = 0, peak = 0, last = 0; // bytes in use now, at most in this pass, at most in the pass before
  int lean = 0;                         // passes in a row that needed less than half of what is kept
  void* take(size_t bytes) {
    bytes = (bytes + REGISTER - 1) / REGISTER * REGISTER;
    while (chunk < chunks.size() && used + bytes > chunks[chunk].size) {
      chunk++;
      used = 0;
    }
    if (chunk == chunks.size()) {
      const size_t size = std::max({bytes, chunks.empty() ? last : 0, size_t(1) << 24});
      void* memory = std::aligned_alloc(REGISTER, (size + REGISTER - 1) / REGISTER * REGISTER);
      if (memory == nullptr) throw std::bad_alloc();
      chunks.push_back({static_cast<char*>(memory), size});
    }
    void* result = chunks[chunk].memory + used;
    used += bytes;
    taken += bytes;
    peak = std::max(peak, taken);
    return result;
  }
  struct Mark {
    size_t chunk, used, taken;
  };
  Mark mark() const { return {chunk, used, taken}; }
  void release(Mark m) {
    chunk = m.chunk;
    used = m.used;
    taken = m.taken;
  }
  // After a pass: several chunks become one of the right size, and one that has long been too large a smaller one.
  void rewind() {
    lean = !chunks.empty() && peak < chunks[0].size / 2 && chunks[0].size > size_t(1) << 24 ? lean + 1 : 0;
    if (chunks.size() > 1 || lean == LEAN_PASSES) clear();
    last = peak;
    chunk = used = taken = peak = 0;
  }
  void clear() {
    for (auto& c : chunks) std::free(c.memory);
    chunks.clear();
    lean = 0;
  }
  ~Arena() { clear(); }
};
std::mutex arenas_lock;
std::vector<Arena*> idle_arenas;
Arena* borrow_arena() {
  std::lock_guard<std::mutex> guard(arenas_lock);
  if (idle_arenas.empty()) return new Arena();
  Arena* arena = idle_arenas.back();
  idle_arenas.pop_back();
  return arena;
}
void return_arena(Arena* arena) {
  arena->rewind();
  std::lock_guard<std::mutex> guard(arenas_lock);
  idle_arenas.push_back(arena);
}

template <class T>
struct Map {  // [block][channel][height * width] of image lanes
  Vec<T>* data = nullptr;
  int channels = 0, height = 0, width = 0;
  int pixels() const { return height * width; }
  Vec<T>* at(int block, int channel) const { return data + ((int64_t)block * channels + channel) * pixels(); }
};

template <class T>
struct ConvState {
  Map<T> first, second, gradient;
};
template <class T>
struct SourceState {
  std::vector<ConvState<T>> convs;
  std::vector<Map<T>> pools, halvings;
};
template <class T>
struct CellState {
  std::vector<Map<T>> in0, in1;
  Map<T> pre0, pre1;
  std::vector<Map<T>> states;
  std::vector<SourceState<T>> sources;
};

}  // namespace
"""
