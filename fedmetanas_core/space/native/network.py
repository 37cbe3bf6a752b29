"""C++: stem, cells and classifier, forward and backward; the end of the pass, and what Python calls."""

NETWORK = r"""
  // ---- the stem: dense 3 x 3 convolutions with an affine batch norm each
  void dense(const Map<T>& in, const StemLayer& layer, Map<T>& out) {
    Sums s = sums(out.channels);
    const T* weight = w + layer.weight;
    for (int block = 0; block < blocks; block++) {
      for (int from = 0; from < out.channels; from += 4) {
        const int group = std::min(4, out.channels - from);
        for (int row = 0; row < out.height; row++) {
          const Range rows = taps(row, layer.stride, 1, 3, in.height);
          for (int column = 0; column < out.width; column++) {
            const Range columns = taps(column, layer.stride, 1, 3, in.width);
            V sum[4] = {V{}, V{}, V{}, V{}};
            for (int c = 0; c < in.channels; c++) {
              const V* corner =
                  in.at(block, c) + (int64_t)(row * layer.stride - 1) * in.width + column * layer.stride - 1;
              for (int i = rows.from; i < rows.to; i++)
                for (int j = columns.from; j < columns.to; j++) {
                  const V value = corner[(int64_t)i * in.width + j];
                  for (int o = 0; o < group; o++)
                    sum[o] += value * weight[((int64_t)(from + o) * in.channels + c) * 9 + i * 3 + j];
                }
            }
            for (int o = 0; o < group; o++) out.at(block, from + o)[(int64_t)row * out.width + column] = sum[o];
          }
        }
      }
      add(s, out.at(block, 0), out.pixels(), out.channels, out.pixels(), block);
    }
    finish(s, layer.norm, out.channels, count(out));
  }
  // gy: the gradient of the convolution's output, already masked. gx: that of its input, or nothing where it is the
  // image.
  void dense_back(const Map<T>& in, const StemLayer& layer, const Map<T>& gy, Map<T>* gx, T* gw) {
    const T* weight = w + layer.weight;
    for (int block = 0; block < blocks; block++)
      for (int o = 0; o < gy.channels; o++) {
        const V* g = gy.at(block, o);
        for (int c = 0; c < in.channels; c++) {
          const int64_t offset = ((int64_t)o * in.channels + c) * 9;
          if (layer.stride == 1)
            depthwise_taps<T, 3, 1, 1>(in.at(block, c), in.height, in.width, g, gy.height, gy.width,
                                       gw + layer.weight + offset);
          else
            depthwise_taps<T, 3, 2, 1>(in.at(block, c), in.height, in.width, g, gy.height, gy.width,
                                       gw + layer.weight + offset);
          if (gx == nullptr) continue;
          if (layer.stride == 1)
            depthwise<T, 3, 1, 1, true>(g, gy.height, gy.width, weight + offset, true, gx->at(block, c), 0,
                                        in.height, in.width);
          else
            depthwise_scatter<T, 3, 2, 1>(gx->at(block, c), in.height, in.width, weight + offset, g, gy.height,
                                          gy.width);
        }
      }
  }
  void stem_forward(const T* pictures) {
    Map<T> x = map(plan.channels, plan.height, plan.width);
    for (int block = 0; block < blocks; block++)
      for (int c = 0; c < x.channels; c++) {
        V* target = x.at(block, c);
        for (int p = 0; p < x.pixels(); p++)
          for (int lane = 0; lane < L; lane++) {
            // Lanes beyond the last image repeat it. They count nowhere, but whatever else stood in them, batch norm
            // could make infinite, and infinity times a mask of 0 is NaN.
            const int image = std::min(block * L + lane, images - 1);
            target[p][lane] = pictures[((int64_t)image * x.channels + c) * x.pixels() + p];
          }
      }
    for (size_t k = 0; k < plan.stem.size(); k++) {
      const StemLayer& layer = plan.stem[k];
      Map<T> y = map(layer.out, shrunk(x.height, layer.stride), shrunk(x.width, layer.stride)),
             z = map(layer.out, y.height, y.width);
      dense(x, layer, y);
      const bool rectifies = k + 1 < plan.stem.size();  // ReLU stands between two layers, not after the last
      for (int block = 0; block < blocks; block++)
        for (int c = 0; c < layer.out; c++) {
          const V scale = all<T>(inv(layer.norm, c) * w[layer.scale + c]), shift = all<T>(mu(layer.norm, c)),
                  add_on = all<T>(w[layer.shift + c]);
          const V* from = y.at(block, c);
          V* to = z.at(block, c);
          for (int p = 0; p < y.pixels(); p++) {
            const V value = (from[p] - shift) * scale + add_on;
            to[p] = rectifies ? rectify<T>(value) : value;
          }
        }
      stem_in.push_back(x);
      stem_out.push_back(y);
      x = z;
    }
    stem_in.push_back(x);  // the stem's own output
  }
  void stem_backward(Map<T> g, T* gw) {
    for (size_t k = plan.stem.size(); k-- > 0;) {
      const StemLayer& layer = plan.stem[k];
      const Map<T>& y = stem_out[k];
      if (k + 1 < plan.stem.size())
        for (int block = 0; block < blocks; block++)
          for (int64_t p = 0; p < (int64_t)g.channels * g.pixels(); p++)
            g.at(block, 0)[p] = rectify_back<T>(stem_in[k + 1].at(block, 0)[p], g.at(block, 0)[p]);
      std::vector<double> sum(layer.out), dot(layer.out);
      dots(g, y, layer.norm, sum.data(), dot.data());
      for (int c = 0; c < layer.out; c++) {
        gw[layer.scale + c] += (T)dot[c];
        gw[layer.shift + c] += (T)sum[c];
        sum[c] *= w[layer.scale + c];
        dot[c] *= w[layer.scale + c];
      }
      const Affine f = back_through(layer.norm, layer.out, 1.0, sum.data(), dot.data(), count(y));
      for (int block = 0; block < blocks; block++)
        for (int c = 0; c < layer.out; c++) {
          const V shift = all<T>(mu(layer.norm, c)), scale = all<T>(w[layer.scale + c]);
          V* target = g.at(block, c);
          for (int p = 0; p < g.pixels(); p++)
            target[p] = apply(f, c, target[p] * scale, y.at(block, c)[p] - shift, mask(block));
        }
      if (k == 0) {
        dense_back(stem_in[0], layer, g, nullptr, gw);
        return;
      }
      Map<T> gx = zeros(stem_in[k]);
      dense_back(stem_in[k], layer, g, &gx, gw);
      g = gx;
    }
  }

  std::vector<Map<T>> outputs_of(int cell) const {  // of a cell, or of the stem for what lies before the first
    if (cell < 0) return {stem_in.back()};
    return std::vector<Map<T>>(cells[cell].states.begin() + 2, cells[cell].states.end());
  }
  void forward(const void* pictures, const void* weights, const void* running, const double* mix_weights,
               void* logits, double* moments) override {
    // A copy, because the weights may change between forward and backward.
    weight_copy.assign(static_cast<const T*>(weights), static_cast<const T*>(weights) + plan.weights);
    w = weight_copy.data();
    statistics = static_cast<const T*>(running);
    mix = mix_weights;
    stem_forward(static_cast<const T*>(pictures));
    cells.resize(plan.cells.size());
    for (size_t k = 0; k < cells.size(); k++) {
      cells[k].in0 = outputs_of((int)k - 2);
      cells[k].in1 = outputs_of((int)k - 1);
      cell_forward(plan.cells[k], cells[k]);
    }
    const auto last = outputs_of((int)cells.size() - 1);
    const int features = total_channels(last);
    T* out = static_cast<T*>(logits);
    for (int block = 0; block < blocks; block++) {
      std::vector<V> pooled;
      for (auto& m : last)
        for (int c = 0; c < m.channels; c++) {
          V sum = V{};
          for (int p = 0; p < m.pixels(); p++) sum += m.at(block, c)[p];
          pooled.push_back(sum * (T(1) / m.pixels()));
        }
      for (int k = 0; k < plan.classes; k++) {
        V sum = all<T>(w[plan.bias + k]);
        for (int c = 0; c < features; c++) sum += pooled[c] * w[plan.classifier + (int64_t)k * features + c];
        for (int lane = 0; lane < L && block * L + lane < images; lane++)
          out[(int64_t)(block * L + lane) * plan.classes + k] = sum[lane];
      }
    }
    if (moments) std::memcpy(moments, mean.data(), sizeof(double) * mean.size());
  }
  void backward(const void* logit_gradient, void* weight_gradient, double* gm) override {
    const T* gl = static_cast<const T*>(logit_gradient);
    T* gw = static_cast<T*>(weight_gradient);
    std::vector<std::vector<Map<T>>> g(cells.size());
    Map<T> stem_gradient = zeros(stem_in.back());
    for (size_t k = 0; k < cells.size(); k++)
      for (auto& m : outputs_of((int)k)) g[k].push_back(zeros(m));
    const auto last = outputs_of((int)cells.size() - 1);
    const int features = total_channels(last);
    for (int block = 0; block < blocks; block++) {
      std::vector<V> gradient(plan.classes, V{});
      for (int k = 0; k < plan.classes; k++) {
        for (int lane = 0; lane < L && block * L + lane < images; lane++)
          gradient[k][lane] = gl[(int64_t)(block * L + lane) * plan.classes + k];
        gw[plan.bias + k] += total<T>(gradient[k]);
      }
      int feature = 0;
      for (size_t node = 0; node < last.size(); node++)
        for (int c = 0; c < last[node].channels; c++, feature++) {
          const Map<T>& m = last[node];
          V pooled = V{}, back = V{};
          for (int p = 0; p < m.pixels(); p++) pooled += m.at(block, c)[p];
          pooled *= all<T>(T(1) / m.pixels());
          for (int k = 0; k < plan.classes; k++) {
            const int64_t place = plan.classifier + (int64_t)k * features + feature;
            gw[place] += total<T>(pooled * gradient[k]);
            back += gradient[k] * w[place];
          }
          back *= all<T>(T(1) / m.pixels());
          V* target = g.back()[node].at(block, c);
          for (int p = 0; p < m.pixels(); p++) target[p] = back;
        }
    }
    const std::vector<Map<T>> stem_only = {stem_gradient};
    for (int k = (int)cells.size() - 1; k >= 0; k--)
      cell_backward(plan.cells[k], cells[k], g[k], k >= 2 ? g[k - 2] : stem_only, k >= 1 ? g[k - 1] : stem_only, gw,
                    mix ? gm : nullptr);
    stem_backward(stem_gradient, gw);
  }
};
}  // namespace
extern "C" {
void* fmn_plan(const int64_t* table) { return new Plan(table); }
void fmn_forget_plan(void* plan) { delete static_cast<Plan*>(plan); }
void* fmn_run(void* plan, int is_double, int images, int training, int keeps) {
  try {
    const Plan& p = *static_cast<Plan*>(plan);
    if (is_double) return static_cast<AnyRun*>(new Run<double>(p, images, training != 0, keeps != 0));
    return static_cast<AnyRun*>(new Run<float>(p, images, training != 0, keeps != 0));
  } catch (const std::bad_alloc&) { return nullptr; }
}
int fmn_forward(void* run, const void* images, const void* weights, const void* statistics, const double* mix,
                void* logits, double* moments) {
  try {
    static_cast<AnyRun*>(run)->forward(images, weights, statistics, mix, logits, moments);
    return 0;
  } catch (const std::bad_alloc&) { return 1; }
}
int fmn_backward(void* run, const void* logit_gradient, void* weight_gradient, double* mix_gradient) {
  try {
    static_cast<AnyRun*>(run)->backward(logit_gradient, weight_gradient, mix_gradient);
    return 0;
  } catch (const std::bad_alloc&) { return 1; }
}
void fmn_forget_run(void* run) { delete static_cast<AnyRun*>(run); }
}
"""
