"""C++: depthwise convolutions and matrix products over channels, on images side by side."""

KERNELS = r"""
// Maps lie as [block of images][channel][row][column][image], so every arithmetic instruction works on as many
// images as a register holds (REGISTER bytes), whatever the number of channels, and every access is aligned. Vectors
// wider than the registers would be taken apart by way of memory, several times as slowly.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#if defined(REGISTER)  // given to the compiler
#elif defined(__AVX512F__)
#define REGISTER 64
#elif defined(__AVX__)
#define REGISTER 32
#else
#define REGISTER 16
#endif

namespace {

template <class T>
struct Lane;
template <>
struct Lane<float> {
  typedef float V __attribute__((vector_size(REGISTER)));
};
template <>
struct Lane<double> {
  typedef double V __attribute__((vector_size(REGISTER)));
};
template <class T>
using Vec = typename Lane<T>::V;

template <class T>
inline Vec<T> all(T value) {
  return Vec<T>{} + value;
}

template <class T>
inline T total(Vec<T> v) {
  T lane[REGISTER / sizeof(T)];
  std::memcpy(lane, &v, REGISTER);
  for (unsigned half = REGISTER / sizeof(T) / 2; half > 0; half /= 2)
    for (unsigned i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}

// Both let NaN through, as torch's ReLU does: a network that has diverged must be seen to.
template <class T>
inline Vec<T> rectify(Vec<T> v) {
  return v < Vec<T>{} ? Vec<T>{} : v;
}
template <class T>
inline Vec<T> rectify_back(Vec<T> v, Vec<T> gradient) {
  return v <= Vec<T>{} ? Vec<T>{} : gradient;
}

// The taps i of K with 0 <= position * stride + i * dilation - pad < size.
struct Range {
  int from, to;
};
inline Range taps(int position, int stride, int dilation, int kernel, int size) {
  int start = position * stride - dilation * (kernel / 2), from = 0, to = kernel;
  while (from < to && start + from * dilation < 0) from++;
  while (to > from && start + (to - 1) * dilation >= size) to--;
  return {from, to};
}
// The outputs o of `count` with 0 <= o * stride + offset < size.
inline Range outputs(int offset, int stride, int size, int count) {
  int from = offset < 0 ? (-offset + stride - 1) / stride : 0;
  int to = size - 1 - offset < 0 ? 0 : (size - 1 - offset) / stride + 1;
  to = std::min(to, count);
  return {from, std::max(from, to)};
}

// ---- depthwise convolution of one channel: rows [row0, row1) of the output, K x K taps, optionally mirrored
template <class T, int K, int S, int D, bool ADD>
void depthwise(const Vec<T>* x, int height, int width, const T* w, bool mirrored, Vec<T>* out, int row0, int row1,
               int out_width) {
  typedef Vec<T> V;
  const int pad = D * (K / 2), step = mirrored ? -1 : 1;
  const T* first = mirrored ? w + K * K - 1 : w;
  const int inner_from = std::min(out_width, (pad + S - 1) / S);
  const int last = width - 1 + pad - (K - 1) * D;
  const int inner_to = std::max(inner_from, std::min(out_width, last < 0 ? 0 : last / S + 1));
  for (int row = row0; row < row1; row++, out += out_width) {
    const Range rows = taps(row, S, D, K, height);
    const V* start = x + (int64_t)(row * S - pad) * width - pad;
    auto border = [&](int column) {
      const Range columns = taps(column, S, D, K, width);
      V sum = ADD ? out[column] : V{};
      for (int i = rows.from; i < rows.to; i++) {
        const V* source = start + (int64_t)i * D * width + column * S;
        for (int j = columns.from; j < columns.to; j++) sum += source[j * D] * first[step * (i * K + j)];
      }
      out[column] = sum;
    };
    int column = 0;
    for (; column < inner_from; column++) border(column);
    for (; column + 8 <= inner_to; column += 8) {
      V sum[8];
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) sum[q] = ADD ? out[column + q] : V{};
      for (int i = rows.from; i < rows.to; i++) {
        const V* source = start + (int64_t)i * D * width + column * S;
#pragma GCC unroll 5
        for (int j = 0; j < K; j++) {
          const V weight = all<T>(first[step * (i * K + j)]);
#pragma GCC unroll 8
          for (int q = 0; q < 8; q++) sum[q] += source[q * S + j * D] * weight;
        }
      }
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++) out[column + q] = sum[q];
    }
    for (; column + 4 <= inner_to; column += 4) {
      V sum[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) sum[q] = ADD ? out[column + q] : V{};
      for (int i = rows.from; i < rows.to; i++) {
        const V* source = start + (int64_t)i * D * width + column * S;
#pragma GCC unroll 5
        for (int j = 0; j < K; j++) {
          const V weight = all<T>(first[step * (i * K + j)]);
#pragma GCC unroll 4
          for (int q = 0; q < 4; q++) sum[q] += source[q * S + j * D] * weight;
        }
      }
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) out[column + q] = sum[q];
    }
    for (; column < out_width; column++) border(column);
  }
}

// Gradient of the taps: gw[i, j] += sum over outputs of x * g.
template <class T, int K, int S, int D>
void depthwise_taps(const Vec<T>* x, int height, int width, const Vec<T>* g, int out_height, int out_width, T* gw) {
  typedef Vec<T> V;
  const int pad = D * (K / 2);
  for (int i = 0; i < K; i++) {
    const Range rows = outputs(i * D - pad, S, height, out_height);
    const int inner_from = std::min(out_width, (pad + S - 1) / S);
    const int last = width - 1 + pad - (K - 1) * D;
    const int inner_to = std::max(inner_from, std::min(out_width, last < 0 ? 0 : last / S + 1));
    V sum[K];
#pragma GCC unroll 5
    for (int j = 0; j < K; j++) sum[j] = V{};
    for (int row = rows.from; row < rows.to; row++) {
      const V* source = x + (int64_t)(row * S + i * D - pad) * width - pad;
      const V* gradient = g + (int64_t)row * out_width;
      for (int column = inner_from; column < inner_to; column++) {
        const V value = gradient[column];
#pragma GCC unroll 5
        for (int j = 0; j < K; j++) sum[j] += value * source[column * S + j * D];
      }
      if (inner_from > 0 || inner_to < out_width) {
#pragma GCC unroll 5
        for (int j = 0; j < K; j++) {
          const Range columns = outputs(j * D - pad, S, width, out_width);
          V extra = V{};
          for (int column = columns.from; column < std::min(columns.to, inner_from); column++)
            extra += gradient[column] * source[column * S + j * D];
          for (int column = std::max(columns.from, inner_to); column < columns.to; column++)
            extra += gradient[column] * source[column * S + j * D];
          sum[j] += extra;
        }
      }
    }
#pragma GCC unroll 5
    for (int j = 0; j < K; j++) gw[i * K + j] += total<T>(sum[j]);
  }
}

// Gradient of the input for stride 2: gx at every tap's place += w * g.
template <class T, int K, int S, int D>
void depthwise_scatter(Vec<T>* gx, int height, int width, const T* w, const Vec<T>* g, int out_height,
                       int out_width) {
  typedef Vec<T> V;
  const int pad = D * (K / 2);
  for (int row = 0; row < out_height; row++) {
    const Range rows = taps(row, S, D, K, height);
    for (int column = 0; column < out_width; column++) {
      const Range columns = taps(column, S, D, K, width);
      const V value = g[(int64_t)row * out_width + column];
      for (int i = rows.from; i < rows.to; i++) {
        V* target = gx + (int64_t)(row * S + i * D - pad) * width + column * S - pad;
        for (int j = columns.from; j < columns.to; j++) target[j * D] += value * w[i * K + j];
      }
    }
  }
}

template <class T>
struct DepthwiseKernels {
  void (*forward)(const Vec<T>*, int, int, const T*, bool, Vec<T>*, int, int, int);
  void (*back)(const Vec<T>*, int, int, const T*, bool, Vec<T>*, int, int, int);  // stride 1 only
  void (*taps)(const Vec<T>*, int, int, const Vec<T>*, int, int, T*);
  void (*scatter)(Vec<T>*, int, int, const T*, const Vec<T>*, int, int);
};
template <class T, int K, int S, int D>
DepthwiseKernels<T> depthwise_kernels() {
  return {depthwise<T, K, S, D, false>, depthwise<T, K, 1, D, true>, depthwise_taps<T, K, S, D>,
          depthwise_scatter<T, K, S, D>};
}
template <class T>
DepthwiseKernels<T> pick_depthwise(int kernel, int stride, int dilation) {
  if (kernel == 3 && stride == 1)
    return dilation == 1 ? depthwise_kernels<T, 3, 1, 1>() : depthwise_kernels<T, 3, 1, 2>();
  if (kernel == 3) return dilation == 1 ? depthwise_kernels<T, 3, 2, 1>() : depthwise_kernels<T, 3, 2, 2>();
  if (stride == 1) return dilation == 1 ? depthwise_kernels<T, 5, 1, 1>() : depthwise_kernels<T, 5, 1, 2>();
  return dilation == 1 ? depthwise_kernels<T, 5, 2, 1>() : depthwise_kernels<T, 5, 2, 2>();
}

// ---- matrix products over channels: out[o][p] (+)= sum over i of w[o * step_out + i * step_in] * in[i][p]
template <class T, int O, int P, bool ADD>
inline void product_tile(const Vec<T>* in, int64_t in_step, int inputs, const T* w, int64_t step_out,
                         int64_t step_in, Vec<T>* out, int64_t out_step) {
  typedef Vec<T> V;
  V sum[O][P];
#pragma GCC unroll 8
  for (int o = 0; o < O; o++)
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) sum[o][p] = ADD ? out[o * out_step + p] : V{};
  for (int i = 0; i < inputs; i++, in += in_step, w += step_in) {
    V value[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) value[p] = in[p];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) {
      const V weight = all<T>(w[o * step_out]);
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) sum[o][p] += weight * value[p];
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < O; o++)
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) out[o * out_step + p] = sum[o][p];
}
template <class T, int O, bool ADD>
inline void product_rows(const Vec<T>* in, int64_t in_step, int inputs, const T* w, int64_t step_out,
                         int64_t step_in, Vec<T>* out, int64_t out_step, int pixels) {
  int p = 0;
  for (; p + 4 <= pixels; p += 4)
    product_tile<T, O, 4, ADD>(in + p, in_step, inputs, w, step_out, step_in, out + p, out_step);
  for (; p < pixels; p++)
    product_tile<T, O, 1, ADD>(in + p, in_step, inputs, w, step_out, step_in, out + p, out_step);
}
template <class T, bool ADD>
void product(const Vec<T>* in, int64_t in_step, int inputs, const T* w, int64_t step_out, int64_t step_in,
             Vec<T>* out, int64_t out_step, int count, int pixels) {
  int o = 0;
  for (; o + 4 <= count; o += 4)
    product_rows<T, 4, ADD>(in, in_step, inputs, w + o * step_out, step_out, step_in, out + o * out_step, out_step,
                            pixels);
  for (; o < count; o++)
    product_rows<T, 1, ADD>(in, in_step, inputs, w + o * step_out, step_out, step_in, out + o * out_step, out_step,
                            pixels);
}

// Gradient of such a product's weights: gw[o * step_out + i * step_in] += sum over p of g[o][p] * in[i][p].
template <class T, int O, int I>
inline void weight_tile(const Vec<T>* g, int64_t g_step, const Vec<T>* in, int64_t in_step, int pixels, T* gw,
                        int64_t step_out, int64_t step_in) {
  typedef Vec<T> V;
  V sum[O][I];
#pragma GCC unroll 4
  for (int o = 0; o < O; o++)
#pragma GCC unroll 4
    for (int i = 0; i < I; i++) sum[o][i] = V{};
  for (int p = 0; p < pixels; p++) {
    V value[I];
#pragma GCC unroll 4
    for (int i = 0; i < I; i++) value[i] = in[i * in_step + p];
#pragma GCC unroll 4
    for (int o = 0; o < O; o++) {
      const V gradient = g[o * g_step + p];
#pragma GCC unroll 4
      for (int i = 0; i < I; i++) sum[o][i] += gradient * value[i];
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < O; o++)
#pragma GCC unroll 4
    for (int i = 0; i < I; i++) gw[o * step_out + i * step_in] += total<T>(sum[o][i]);
}
template <class T>
void product_weights(const Vec<T>* g, int64_t g_step, int count, const Vec<T>* in, int64_t in_step, int inputs,
                     int pixels, T* gw, int64_t step_out, int64_t step_in) {
  int o = 0;
  for (; o + 4 <= count; o += 4) {
    int i = 0;
    for (; i + 4 <= inputs; i += 4)
      weight_tile<T, 4, 4>(g + o * g_step, g_step, in + i * in_step, in_step, pixels,
                           gw + o * step_out + i * step_in, step_out, step_in);
    for (; i < inputs; i++)
      weight_tile<T, 4, 1>(g + o * g_step, g_step, in + i * in_step, in_step, pixels,
                           gw + o * step_out + i * step_in, step_out, step_in);
  }
  for (; o < count; o++)
    for (int i = 0; i < inputs; i++)
      weight_tile<T, 1, 1>(g + o * g_step, g_step, in + i * in_step, in_step, pixels,
                           gw + o * step_out + i * step_in, step_out, step_in);
}
}  // namespace
"""
