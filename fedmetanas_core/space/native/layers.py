"""C++: batch norm, convolutions and what goes back through them; the beginning of a pass."""

LAYERS = r"""
namespace {

// One pass forward and, at most once, backward.
struct AnyRun {
  virtual void forward(const void* images, const void* weights, const void* statistics, const double* mix,
                       void* logits, double* moments) = 0;
  virtual void backward(const void* logit_gradient, void* weight_gradient, double* mix_gradient) = 0;
  virtual ~AnyRun() {}
};

template <class T>
struct Run : AnyRun {
  typedef Vec<T> V;
  static constexpr int L = REGISTER / sizeof(T);
  static constexpr double epsilon = 1e-5;
  static constexpr int BAND =
      384;  // lanes of a band of rows that is worked on while it is in the first-level cache

  const Plan& plan;
  const int images, blocks;
  const bool training, keeps;  // keeps: what the way back needs
  Arena* arena;
  const T *w = nullptr, *statistics = nullptr;
  const double* mix = nullptr;
  std::vector<double> mean, inverse;  // at the offsets of Norm.mean and Norm.variance
  V last_mask;
  std::vector<Map<T>> stem_out;  // before batch norm, then after it
  std::vector<Map<T>> stem_in;
  std::vector<CellState<T>> cells;
  std::vector<T> weight_copy;

  Run(const Plan& p, int n, bool trains, bool goes_back)
      : plan(p),
        images(n),
        blocks((n + L - 1) / L),
        training(trains),
        keeps(goes_back),
        arena(borrow_arena()),
        mean(p.statistics),
        inverse(p.statistics) {
    for (int lane = 0; lane < L; lane++) last_mask[lane] = (blocks - 1) * L + lane < images ? T(1) : T(0);
  }
  ~Run() override { return_arena(arena); }

  V mask(int block) const { return block == blocks - 1 ? last_mask : all<T>(T(1)); }
  Map<T> map(int channels, int height, int width) {
    Map<T> m;
    m.channels = channels;
    m.height = height;
    m.width = width;
    m.data = static_cast<V*>(arena->take(sizeof(V) * (size_t)blocks * channels * m.pixels()));
    return m;
  }
  Map<T> zeros(const Map<T>& like) {
    Map<T> m = map(like.channels, like.height, like.width);
    std::memset(m.data, 0, sizeof(V) * (size_t)blocks * m.channels * m.pixels());
    return m;
  }
  V* scratch(size_t lanes) { return static_cast<V*>(arena->take(sizeof(V) * lanes)); }
  double coefficient(int64_t position) const { return mix == nullptr ? 1.0 : mix[position]; }
  double count(const Map<T>& m) const { return (double)images * m.pixels(); }

  // ---- batch norm statistics, around a first guess of the mean so that float does not cancel
  struct Sums {
    std::vector<V> sum, square;
    std::vector<T> around;
    bool begun = false;
  };
  Sums sums(int channels) {
    Sums s;
    s.sum.assign(channels, V{});
    s.square.assign(channels, V{});
    s.around.assign(channels, T(0));
    return s;
  }
  void add(Sums& s, const V* y, int64_t step, int channels, int pixels, int block) {
    if (!training) return;
    if (!s.begun)
      for (int c = 0; c < channels; c++) {
        const int lanes = std::min(images, L);
        V near = V{};
        for (int p = 0; p < pixels; p++) near += y[c * step + p];
        T guess = 0;
        for (int lane = 0; lane < lanes; lane++) guess += near[lane];
        s.around[c] = guess / (lanes * pixels);
      }
    s.begun = true;
    const V m = mask(block);
    for (int c = 0; c < channels; c++) {
      const V shift = all<T>(s.around[c]);
      V sum = V{}, square = V{};
      for (int p = 0; p < pixels; p++) {
        const V d = y[c * step + p] - shift;
        sum += d;
        square += d * d;
      }
      s.sum[c] += sum * m;
      s.square[c] += square * m;
    }
  }
  void finish(const Sums& s, Norm n, int channels, double number) {
    for (int c = 0; c < channels; c++) {
      double variance;
      if (training) {
        double sum = 0, square = 0;
        for (int lane = 0; lane < L; lane++) {
          sum += s.sum[c][lane];
          square += s.square[c][lane];
        }
        const double offset = sum / number;
        mean[n.mean + c] = s.around[c] + offset;
        variance = square / number - offset * offset;
        if (variance < 0) variance = 0;  // and not std::max, which would make 0 of NaN
        mean[n.variance + c] = variance;
      } else {
        mean[n.mean + c] = statistics[n.mean + c];
        variance = statistics[n.variance + c];
      }
      inverse[n.variance + c] = 1.0 / std::sqrt(variance + epsilon);
    }
  }
  T inv(Norm n, int c) const { return (T)inverse[n.variance + c]; }
  T mu(Norm n, int c) const { return (T)mean[n.mean + c]; }
  T gamma(Norm n, int c) const { return n.scale < 0 ? T(1) : w[n.scale + c]; }
  T beta(Norm n, int c) const { return n.shift < 0 ? T(0) : w[n.shift + c]; }

  // The gradient of what went into a batch norm is a * g + b * (y - mean) + d per channel, g that of what came out.
  struct Affine {
    std::vector<T> a, b, d;
  };
  Affine back_through(Norm n, int channels, double scale, const double* sum, const double* dot,
                      double number) const {
    Affine f;
    f.a.resize(channels);
    f.b.assign(channels, T(0));
    f.d.assign(channels, T(0));
    for (int c = 0; c < channels; c++) {
      const double i = inverse[n.variance + c], z = scale * gamma(n, c);
      f.a[c] = (T)(z * i);
      if (training) {
        f.b[c] = (T)(-z * i * i * dot[c] / number);
        f.d[c] = (T)(-z * i * sum[c] / number);
      }
    }
    return f;
  }
  // The gradients of a norm's own scale and shift, where it has them; `scale` is what its output is weighed by.
  void affine_back(Norm n, int channels, double scale, const double* sum, const double* dot, T* gw) const {
    if (n.scale < 0) return;
    for (int c = 0; c < channels; c++) {
      gw[n.scale + c] += (T)(scale * dot[c]);
      gw[n.shift + c] += (T)(scale * sum[c]);
    }
  }
  // The gradient of what the norm's output is weighed by.
  double weight_back(Norm n, int channels, const double* sum, const double* dot) const {
    double gradient = 0;
    for (int c = 0; c < channels; c++) gradient += gamma(n, c) * dot[c] + beta(n, c) * sum[c];
    return gradient;
  }
  V apply(const Affine& f, int c, V g, V centred, V m) const {
    return (g * f.a[c] + centred * f.b[c] + f.d[c]) * m;
  }
  // Per channel: sum of g, and sum of g * (y - mean) * inverse.
  void dots(const Map<T>& g, const Map<T>& y, Norm n, double* sum, double* dot) const {
    for (int c = 0; c < y.channels; c++) {
      const V shift = all<T>(mu(n, c));
      double plain = 0, product = 0;
      for (int block = 0; block < blocks; block++) {
        const V *a = g.at(block, c), *b = y.at(block, c);
        V s = V{}, q = V{};
        for (int p = 0; p < y.pixels(); p++) {
          s += a[p];
          q += a[p] * (b[p] - shift);
        }
        plain += total<T>(s);
        product += total<T>(q);
      }
      sum[c] = plain;
      dot[c] = product * inverse[n.variance + c];
    }
  }

  // ---- depthwise and pointwise convolution, a band of rows at a time
  int band(int channels, int width, int height) const {
    return std::max(1, std::min(height, BAND / std::max(1, channels * width)));
  }
  void convolve(const V* in, int height, int width, const Conv& conv, int stride, bool second, Map<T>& out,
                int block, Sums& s, V* u) {
    const auto kernels = pick_depthwise<T>(conv.kernel, second ? 1 : stride, second ? 1 : conv.dilation);
    const T *depth = w + (second ? conv.depth2 : conv.depth1), *point = w + (second ? conv.point2 : conv.point1);
    const int C = out.channels, taps = conv.kernel * conv.kernel, rows = band(C, out.width, out.height);
    for (int row = 0; row < out.height; row += rows) {
      const int to = std::min(out.height, row + rows), pixels = (to - row) * out.width;
      for (int c = 0; c < C; c++)
        kernels.forward(in + (int64_t)c * height * width, height, width, depth + c * taps, false,
                        u + (int64_t)c * pixels, row, to, out.width);
      V* y = out.at(block, 0) + (int64_t)row * out.width;
      product<T, false>(u, pixels, C, point, C, 1, y, out.pixels(), C, pixels);
      add(s, y, out.pixels(), C, pixels, block);
    }
  }
  // `gradient_in` receives what the input's gradient is; for stride 1 it is overwritten unless `adds`.
  template <class G>
  void convolve_back(const V* in, int height, int width, const Conv& conv, int stride, bool second, const Map<T>& y,
                     Norm n, const Affine& f, G gradient, int block, V* u, V* gy, V* gu, V* gradient_in, bool adds,
                     T* gw) {
    const auto kernels = pick_depthwise<T>(conv.kernel, second ? 1 : stride, second ? 1 : conv.dilation);
    const int64_t depth = second ? conv.depth2 : conv.depth1, point = second ? conv.point2 : conv.point1;
    const int C = y.channels, taps = conv.kernel * conv.kernel, rows = band(C, y.width, y.height), P = y.pixels();
    const V m = mask(block);
    for (int row = 0; row < y.height; row += rows) {
      const int to = std::min(y.height, row + rows), pixels = (to - row) * y.width, start = row * y.width;
      for (int c = 0; c < C; c++) {
        kernels.forward(in + (int64_t)c * height * width, height, width, w + depth + c * taps, false,
                        u + (int64_t)c * pixels, row, to, y.width);
        const V *g = gradient(c) + start, *value = y.at(block, c) + start;
        const V shift = all<T>(mu(n, c));
        for (int p = 0; p < pixels; p++) gy[(int64_t)c * pixels + p] = apply(f, c, g[p], value[p] - shift, m);
      }
      product_weights<T>(gy, pixels, C, u, pixels, C, pixels, gw + point, C, 1);
      product<T, false>(gy, pixels, C, w + point, 1, C, gu + start, P, C, pixels);
    }
    for (int c = 0; c < C; c++) {
      const V* g = gu + (int64_t)c * P;
      const V* x = in + (int64_t)c * height * width;
      V* target = gradient_in + (int64_t)c * height * width;
      kernels.taps(x, height, width, g, y.height, y.width, gw + depth + c * taps);
      if (!second && stride == 2) {
        kernels.scatter(target, height, width, w + depth + c * taps, g, y.height, y.width);
        continue;
      }
      if (!adds) std::memset(target, 0, sizeof(V) * height * width);
      kernels.back(g, y.height, y.width, w + depth + c * taps, true, target, 0, height, width);
    }
  }

  // ---- pointwise convolution of rectified maps that lie one after the other, optionally at every second pixel
  int total_channels(const std::vector<Map<T>>& maps) const {
    int n = 0;
    for (auto& m : maps) n += m.channels;
    return n;
  }
  void gather(const std::vector<Map<T>>& in, int block, int start, int pixels, int out_width, int stride,
              int offset, V* u) const {
    for (auto& m : in)
      for (int c = 0; c < m.channels; c++, u += pixels) {
        const V* x = m.at(block, c);
        if (stride == 1) {
          for (int p = 0; p < pixels; p++) u[p] = rectify<T>(x[start + p]);
          continue;
        }
        for (int p = 0; p < pixels; p++) {
          const int row = (start + p) / out_width * 2 + offset, column = (start + p) % out_width * 2 + offset;
          u[p] = row < m.height && column < m.width ? rectify<T>(x[(int64_t)row * m.width + column]) : V{};
        }
      }
  }
  void scatter_back(const std::vector<Map<T>>& in, const std::vector<Map<T>>& gradients, int block, int start,
                    int pixels, int out_width, int stride, int offset, const V* gu) const {
    for (size_t i = 0; i < in.size(); i++)
      for (int c = 0; c < in[i].channels; c++, gu += pixels) {
        const V* x = in[i].at(block, c);
        V* target = gradients[i].at(block, c);
        for (int p = 0; p < pixels; p++) {
          int64_t place = start + p;
          if (stride == 2) {
            const int row = (start + p) / out_width * 2 + offset, column = (start + p) % out_width * 2 + offset;
            if (row >= in[i].height || column >= in[i].width) continue;
            place = (int64_t)row * in[i].width + column;
          }
          target[place] += rectify_back<T>(x[place], gu[p]);
        }
      }
  }
  int pixels_at_once(int channels, const Map<T>& out) const {
    return std::max(4, std::min(out.pixels(), 2 * BAND / channels));
  }
  // parts: (weights, first output channel, output channels, offset of the sampled pixel)
  struct Part {
    int64_t weight;
    int from, count, offset;
  };
  std::vector<Part> halves(const Halving& h, int channels) const {
    return {{h.even, 0, channels / 2, 0}, {h.odd, channels / 2, channels - channels / 2, 1}};
  }
  void pointwise(const std::vector<Map<T>>& in, const std::vector<Part>& parts, int stride, Norm n, Map<T>& out) {
    const int inputs = total_channels(in), step = pixels_at_once(inputs, out);
    V* u = scratch((size_t)inputs * step);
    Sums s = sums(out.channels);
    for (int block = 0; block < blocks; block++)
      for (int start = 0; start < out.pixels(); start += step) {
        const int pixels = std::min(step, out.pixels() - start);
        for (auto& part : parts) {
          if (stride == 2 || &part == &parts[0])
            gather(in, block, start, pixels, out.width, stride, part.offset, u);
          product<T, false>(u, pixels, inputs, w + part.weight, inputs, 1, out.at(block, part.from) + start,
                            out.pixels(), part.count, pixels);
        }
        add(s, out.at(block, 0) + start, out.pixels(), out.channels, pixels, block);
      }
    finish(s, n, out.channels, count(out));
  }
  void pointwise_back(const std::vector<Map<T>>& in, const std::vector<Map<T>>& gradients,
                      const std::vector<Part>& parts, int stride, Norm n, const Map<T>& y, const Map<T>& g,
                      const Affine& f, T* gw) {
    const int inputs = total_channels(in), step = pixels_at_once(inputs, y);
    V *u = scratch((size_t)inputs * step), *gu = scratch((size_t)inputs * step),
      *gy = scratch((size_t)y.channels * step);
    for (int block = 0; block < blocks; block++)
      for (int start = 0; start < y.pixels(); start += step) {
        const int pixels = std::min(step, y.pixels() - start);
        const V m = mask(block);
        for (int c = 0; c < y.channels; c++) {
          const V shift = all<T>(mu(n, c));
          for (int p = 0; p < pixels; p++)
            gy[(int64_t)c * pixels + p] =
                apply(f, c, g.at(block, c)[start + p], y.at(block, c)[start + p] - shift, m);
        }
        for (auto& part : parts) {
          gather(in, block, start, pixels, y.width, stride, part.offset, u);
          const V* own = gy + (int64_t)part.from * pixels;
          product_weights<T>(own, pixels, part.count, u, pixels, inputs, pixels, gw + part.weight, inputs, 1);
          product<T, false>(own, pixels, part.count, w + part.weight, 1, inputs, gu, pixels, inputs, pixels);
          scatter_back(in, gradients, block, start, pixels, y.width, stride, part.offset, gu);
        }
      }
  }
"""
