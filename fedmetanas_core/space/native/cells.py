"""C++: a cell, arranged by source, forward and backward; goes on with the pass."""

CELLS = r"""
  // ---- pooling over the 3 x 3 neighbours that exist
  void pool(const V* x, int height, int width, int stride, bool largest, V* out, int out_height,
            int out_width) const {
    for (int row = 0; row < out_height; row++) {
      const Range rows = taps(row, stride, 1, 3, height);
      for (int column = 0; column < out_width; column++) {
        const Range columns = taps(column, stride, 1, 3, width);
        const V* corner = x + (int64_t)(row * stride - 1) * width + column * stride - 1;
        V value = corner[(int64_t)rows.from * width + columns.from];
        for (int i = rows.from; i < rows.to; i++)
          for (int j = (i == rows.from ? columns.from + 1 : columns.from); j < columns.to; j++) {
            const V other = corner[(int64_t)i * width + j];
            value = largest ? ((other > value) | (other != other) ? other : value) : value + other;
          }
        if (!largest) value *= all<T>(T(1) / ((rows.to - rows.from) * (columns.to - columns.from)));
        out[(int64_t)row * out_width + column] = value;
      }
    }
  }
  void pool_back(const V* x, int height, int width, int stride, bool largest, const V* out, const V* g, V* gx,
                 int out_height, int out_width) const {
    for (int row = 0; row < out_height; row++) {
      const Range rows = taps(row, stride, 1, 3, height);
      for (int column = 0; column < out_width; column++) {
        const Range columns = taps(column, stride, 1, 3, width);
        const int64_t corner = (int64_t)(row * stride - 1) * width + column * stride - 1;
        V gradient = g[(int64_t)row * out_width + column];
        if (!largest) gradient *= all<T>(T(1) / ((rows.to - rows.from) * (columns.to - columns.from)));
        const V value = out[(int64_t)row * out_width + column];
        for (int i = rows.from; i < rows.to; i++)
          for (int j = columns.from; j < columns.to; j++) {
            const int64_t place = corner + (int64_t)i * width + j;
            if (!largest) {
              gx[place] += gradient;
              continue;
            }
            const auto hit = x[place] == value;  // the first of equals takes the gradient
            gx[place] += hit ? gradient : V{};
            gradient = hit ? V{} : gradient;
          }
      }
    }
  }

  struct Term {
    const Map<T>* map;
    const Norm* norm;
    double mix;
  };
  void combine(const std::vector<Term>& terms, Map<T>& out) const {
    std::vector<T> factor(terms.size());
    std::vector<const V*> from(terms.size());
    const int P = out.pixels();
    for (int block = 0; block < blocks; block++)
      for (int c = 0; c < out.channels; c++) {
        double shift = 0;
        for (size_t t = 0; t < terms.size(); t++) {
          const Norm* n = terms[t].norm;
          const double a = terms[t].mix * (n ? inverse[n->variance + c] * gamma(*n, c) : 1.0);
          if (n) shift += terms[t].mix * beta(*n, c) - a * mean[n->mean + c];
          factor[t] = (T)a;
          from[t] = terms[t].map->at(block, c);
        }
        V* target = out.at(block, c);
        int p = 0;
        for (; p + 8 <= P; p += 8) {
          V sum[8];
#pragma GCC unroll 8
          for (int q = 0; q < 8; q++) sum[q] = all<T>((T)shift);
          for (size_t t = 0; t < terms.size(); t++) {
            const V a = all<T>(factor[t]);
#pragma GCC unroll 8
            for (int q = 0; q < 8; q++) sum[q] += a * from[t][p + q];
          }
#pragma GCC unroll 8
          for (int q = 0; q < 8; q++) target[p + q] = sum[q];
        }
        for (; p < P; p++) {
          V sum = all<T>((T)shift);
          for (size_t t = 0; t < terms.size(); t++) sum += from[t][p] * factor[t];
          target[p] = sum;
        }
      }
  }

  // ---- a cell: work is arranged by source, whose rectified form and poolings serve all its edges
  static int shrunk(int size, int stride) { return (size + stride - 1) / stride; }
  void source_forward(const Source& source, const Map<T>& x, SourceState<T>& state) {
    const int C = x.channels, height = shrunk(x.height, source.stride), width = shrunk(x.width, source.stride);
    state.convs.resize(source.convs.size());
    for (size_t k = 0; k < source.convs.size(); k++) {
      state.convs[k].first = map(C, height, width);
      if (source.convs[k].twice) state.convs[k].second = map(C, height, width);
    }
    for (size_t k = 0; k < source.pools.size(); k++) state.pools.push_back(map(C, height, width));
    for (auto& skip : source.skips) state.halvings.push_back(skip.halves ? map(C, height, width) : Map<T>());
    const auto mark = arena->mark();
    V *r = scratch((size_t)C * x.pixels()), *u = scratch(std::max((size_t)BAND, (size_t)C * width));
    std::vector<Sums> first;
    for (size_t k = 0; k < source.convs.size(); k++) first.push_back(sums(C));
    if (!source.convs.empty())
      for (int block = 0; block < blocks; block++) {
        const V* from = x.at(block, 0);
        for (int64_t p = 0; p < (int64_t)C * x.pixels(); p++) r[p] = rectify<T>(from[p]);
        for (size_t k = 0; k < source.convs.size(); k++)
          convolve(r, x.height, x.width, source.convs[k], source.stride, false, state.convs[k].first, block,
                   first[k], u);
      }
    for (size_t k = 0; k < source.convs.size(); k++) {
      const Conv& conv = source.convs[k];
      finish(first[k], conv.norm1, C, count(state.convs[k].first));
      if (!conv.twice) continue;
      Sums second = sums(C);
      for (int block = 0; block < blocks; block++) {
        rectified_norm(state.convs[k].first, conv.norm1, block, r);
        convolve(r, height, width, conv, 1, true, state.convs[k].second, block, second, u);
      }
      finish(second, conv.norm2, C, count(state.convs[k].second));
    }
    for (size_t k = 0; k < source.pools.size(); k++) {
      Map<T>& out = state.pools[k];
      Sums s = sums(C);
      for (int block = 0; block < blocks; block++) {
        for (int c = 0; c < C; c++)
          pool(x.at(block, c), x.height, x.width, source.stride, source.pools[k].largest, out.at(block, c), height,
               width);
        add(s, out.at(block, 0), out.pixels(), C, out.pixels(), block);
      }
      if (source.pools[k].norm.exists()) finish(s, source.pools[k].norm, C, count(out));
    }
    for (size_t k = 0; k < source.skips.size(); k++) {
      const Skip& skip = source.skips[k];
      if (skip.halves) pointwise({x}, halves(skip.halving, C), 2, skip.halving.norm, state.halvings[k]);
    }
    arena->release(mark);
  }
  void rectified_norm(const Map<T>& y, Norm n, int block, V* out) const {
    for (int c = 0; c < y.channels; c++) {
      const V *from = y.at(block, c), scale = all<T>(inv(n, c) * gamma(n, c)), shift = all<T>(mu(n, c)),
              add_on = all<T>(beta(n, c));
      for (int p = 0; p < y.pixels(); p++)
        out[(int64_t)c * y.pixels() + p] = rectify<T>((from[p] - shift) * scale + add_on);
    }
  }
  void cell_forward(const CellPlan& plan_of_cell, CellState<T>& cell) {
    const int C = plan_of_cell.channels;
    const Map<T>& before = cell.in1[0];
    const int stride = plan_of_cell.reduces ? 2 : 1;
    std::vector<Map<T>> nodes;
    for (int node = 0; node < plan.nodes; node++)
      nodes.push_back(map(C, shrunk(before.height, stride), shrunk(before.width, stride)));
    const auto beginning = arena->mark();  // beyond here everything serves this cell alone
    cell.pre0 = map(C, before.height, before.width);
    cell.pre1 = map(C, before.height, before.width);
    Map<T> out0 = map(C, before.height, before.width), out1 = map(C, before.height, before.width);
    const auto mark = arena->mark();
    if (plan_of_cell.halves0)
      pointwise(cell.in0, halves(plan_of_cell.halving0, C), 2, plan_of_cell.halving0.norm, cell.pre0);
    else pointwise(cell.in0, {{plan_of_cell.point0, 0, C, 0}}, 1, plan_of_cell.norm0, cell.pre0);
    pointwise(cell.in1, {{plan_of_cell.point1, 0, C, 0}}, 1, plan_of_cell.norm1, cell.pre1);
    arena->release(mark);
    const Norm n0 = plan_of_cell.halves0 ? plan_of_cell.halving0.norm : plan_of_cell.norm0;
    combine({{&cell.pre0, &n0, 1.0}}, out0);
    combine({{&cell.pre1, &plan_of_cell.norm1, 1.0}}, out1);
    cell.states = {out0, out1};
    cell.sources.resize(plan.nodes + 1);
    cell.states.insert(cell.states.end(), nodes.begin(), nodes.end());
    for (int s = 0; s <= plan.nodes; s++) {
      if (keeps && s >= 2) node_forward(plan_of_cell, cell, s - 2, 0, s - 1);
      const auto source_alone = arena->mark();
      source_forward(plan_of_cell.sources[s], cell.states[s], cell.sources[s]);
      if (keeps) continue;
      for (int node = std::max(0, s - 1); node < plan.nodes; node++) node_forward(plan_of_cell, cell, node, s, s);
      arena->release(source_alone);
    }
    if (keeps) node_forward(plan_of_cell, cell, plan.nodes - 1, 0, plan.nodes);
    else arena->release(beginning);
  }
  // Set a node to what the sources from `first` to `last` give it, or add that where `first` is not the first one.
  void node_forward(const CellPlan& plan_of_cell, CellState<T>& cell, int node, int first, int last) {
    std::vector<Term> terms;
    if (first > 0) terms.push_back({&cell.states[2 + node], nullptr, 1.0});
    for (int s = first; s <= last; s++) {
      const Source& source = plan_of_cell.sources[s];
      const SourceState<T>& state = cell.sources[s];
      for (size_t k = 0; k < source.convs.size(); k++)
        if (source.convs[k].node == node) {
          const Conv& conv = source.convs[k];
          terms.push_back({conv.twice ? &state.convs[k].second : &state.convs[k].first,
                           conv.twice ? &conv.norm2 : &conv.norm1, coefficient(conv.mix)});
        }
      for (size_t k = 0; k < source.pools.size(); k++)
        for (size_t i = 0; i < source.pools[k].node.size(); i++)
          if (source.pools[k].node[i] == node)
            terms.push_back({&state.pools[k], source.pools[k].norm.exists() ? &source.pools[k].norm : nullptr,
                             coefficient(source.pools[k].mix[i])});
      for (size_t k = 0; k < source.skips.size(); k++)
        if (source.skips[k].node == node) {
          const Skip& skip = source.skips[k];
          terms.push_back({skip.halves ? &state.halvings[k] : &cell.states[s],
                           skip.halves ? &skip.halving.norm : nullptr, coefficient(skip.mix)});
        }
    }
    combine(terms, cell.states[2 + node]);
  }

  // ---- backward; `g` holds the gradients of the cell's states, those of its nodes complete but for its own later
  // edges
  void source_backward(const CellPlan& plan_of_cell, CellState<T>& cell, int s, std::vector<Map<T>>& g, T* gw,
                       double* gm) {
    const Source& source = plan_of_cell.sources[s];
    SourceState<T>& state = cell.sources[s];
    const Map<T>& x = cell.states[s];
    Map<T>& gx = g[s];
    const int C = x.channels, height = shrunk(x.height, source.stride), width = shrunk(x.width, source.stride),
              P = height * width;
    const auto mark = arena->mark();
    const size_t lanes = (size_t)C * std::max(P, x.pixels()), banded = std::max((size_t)BAND, (size_t)C * width);
    V *r = scratch(lanes), *gr = scratch(lanes), *u = scratch(banded), *gy = scratch(banded),
      *gu = scratch((size_t)C * P);
    std::vector<double> sum(C), dot(C);
    std::vector<Affine> affine;
    for (size_t k = 0; k < source.convs.size(); k++) {
      const Conv& conv = source.convs[k];
      ConvState<T>& own = state.convs[k];
      const Map<T>& out = conv.twice ? own.second : own.first;
      const Norm n = conv.twice ? conv.norm2 : conv.norm1;
      const Map<T>& upstream = g[2 + conv.node];
      dots(upstream, out, n, sum.data(), dot.data());
      if (gm) gm[conv.mix] += weight_back(n, C, sum.data(), dot.data());
      affine_back(n, C, coefficient(conv.mix), sum.data(), dot.data(), gw);
      Affine f = back_through(n, C, coefficient(conv.mix), sum.data(), dot.data(), count(out));
      own.gradient = upstream;
      if (conv.twice) {
        own.gradient = map(C, height, width);
        for (int block = 0; block < blocks; block++) {
          rectified_norm(own.first, conv.norm1, block, r);
          V* gz = own.gradient.at(block, 0);
          convolve_back(
              r, height, width, conv, 1, true, own.second, n, f, [&](int c) { return upstream.at(block, c); },
              block, u, gy, gu, gz, false, gw);
          for (int64_t p = 0; p < (int64_t)C * P; p++) gz[p] = rectify_back<T>(r[p], gz[p]);
        }
        dots(own.gradient, own.first, conv.norm1, sum.data(), dot.data());
        affine_back(conv.norm1, C, 1.0, sum.data(), dot.data(), gw);
        f = back_through(conv.norm1, C, 1.0, sum.data(), dot.data(), count(own.first));
      }
      affine.push_back(f);
    }
    if (!source.convs.empty())
      for (int block = 0; block < blocks; block++) {
        const V* from = x.at(block, 0);
        const int64_t all_lanes = (int64_t)C * x.pixels();
        for (int64_t p = 0; p < all_lanes; p++) r[p] = rectify<T>(from[p]);
        std::memset(gr, 0, sizeof(V) * all_lanes);
        for (size_t k = 0; k < source.convs.size(); k++) {
          const ConvState<T>& own = state.convs[k];
          convolve_back(
              r, x.height, x.width, source.convs[k], source.stride, false, own.first, source.convs[k].norm1,
              affine[k], [&](int c) { return own.gradient.at(block, c); }, block, u, gy, gu, gr, true, gw);
        }
        V* target = gx.at(block, 0);
        for (int64_t p = 0; p < all_lanes; p++) target[p] += rectify_back<T>(r[p], gr[p]);
      }
    for (size_t k = 0; k < source.pools.size(); k++)
      pool_source_back(source, source.pools[k], state.pools[k], x, gx, g, gr, gm);
    for (size_t k = 0; k < source.skips.size(); k++)
      skip_back(source.skips[k], state.halvings[k], x, gx, g[2 + source.skips[k].node], gw, gm);
    arena->release(mark);
  }
  double overlap(const Map<T>& g, const Map<T>& y) const {
    double result = 0;
    for (int block = 0; block < blocks; block++) {
      const V *a = g.at(block, 0), *b = y.at(block, 0);
      V sum = V{};
      for (int64_t p = 0; p < (int64_t)y.channels * y.pixels(); p++) sum += a[p] * b[p];
      result += total<T>(sum * mask(block));
    }
    return result;
  }
  void pool_source_back(const Source& source, const Pool& pool_plan, const Map<T>& y, const Map<T>& x, Map<T>& gx,
                        const std::vector<Map<T>>& g, V* gp, double* gm) {
    const int C = y.channels, P = y.pixels();
    const bool norms = pool_plan.norm.exists();
    std::vector<double> sum(C), dot(C), sum_all(C, 0.0), dot_all(C, 0.0);
    for (size_t i = 0; i < pool_plan.node.size(); i++) {
      if (!norms) {
        if (gm) gm[pool_plan.mix[i]] += overlap(g[2 + pool_plan.node[i]], y);
        continue;
      }
      dots(g[2 + pool_plan.node[i]], y, pool_plan.norm, sum.data(), dot.data());
      const double z = coefficient(pool_plan.mix[i]);
      for (int c = 0; c < C; c++) {
        if (gm) gm[pool_plan.mix[i]] += dot[c];
        sum_all[c] += z * sum[c];
        dot_all[c] += z * dot[c];
      }
    }
    Affine f;
    if (norms) f = back_through(pool_plan.norm, C, 1.0, sum_all.data(), dot_all.data(), count(y));
    for (int block = 0; block < blocks; block++)
      for (int c = 0; c < C; c++) {
        const V *value = y.at(block, c), shift = all<T>(norms ? mu(pool_plan.norm, c) : T(0)), m = mask(block);
        for (int p = 0; p < P; p++) gp[p] = V{};
        for (size_t i = 0; i < pool_plan.node.size(); i++) {
          const V *upstream = g[2 + pool_plan.node[i]].at(block, c), z = all<T>((T)coefficient(pool_plan.mix[i]));
          for (int p = 0; p < P; p++) gp[p] += upstream[p] * z;
        }
        for (int p = 0; p < P; p++) gp[p] = norms ? apply(f, c, gp[p], value[p] - shift, m) : gp[p] * m;
        pool_back(x.at(block, c), x.height, x.width, source.stride, pool_plan.largest, value, gp, gx.at(block, c),
                  y.height, y.width);
      }
  }
  void skip_back(const Skip& skip, const Map<T>& y, const Map<T>& x, Map<T>& gx, const Map<T>& upstream, T* gw,
                 double* gm) {
    const int C = x.channels;
    const double z = coefficient(skip.mix);
    if (skip.halves) {
      std::vector<double> sum(C), dot(C);
      dots(upstream, y, skip.halving.norm, sum.data(), dot.data());
      if (gm) gm[skip.mix] += weight_back(skip.halving.norm, C, sum.data(), dot.data());
      affine_back(skip.halving.norm, C, z, sum.data(), dot.data(), gw);
      const Affine f = back_through(skip.halving.norm, C, z, sum.data(), dot.data(), count(y));
      pointwise_back({x}, {gx}, halves(skip.halving, C), 2, skip.halving.norm, y, upstream, f, gw);
      return;
    }
    const V factor = all<T>((T)z);
    for (int block = 0; block < blocks; block++)
      for (int c = 0; c < C; c++) {
        const V *g = upstream.at(block, c), *value = x.at(block, c);
        V *target = gx.at(block, c), sum = V{};
        for (int p = 0; p < x.pixels(); p++) {
          sum += g[p] * value[p];
          target[p] += g[p] * factor;
        }
        if (gm) gm[skip.mix] += total<T>(sum * mask(block));
      }
  }
  void cell_backward(const CellPlan& plan_of_cell, CellState<T>& cell, const std::vector<Map<T>>& node_gradients,
                     const std::vector<Map<T>>& g0, const std::vector<Map<T>>& g1, T* gw, double* gm) {
    const auto mark = arena->mark();
    std::vector<Map<T>> g = {zeros(cell.states[0]), zeros(cell.states[1])};
    g.insert(g.end(), node_gradients.begin(), node_gradients.end());
    for (int s = plan.nodes; s >= 0; s--) source_backward(plan_of_cell, cell, s, g, gw, gm);
    const int C = plan_of_cell.channels;
    const Norm n0 = plan_of_cell.halves0 ? plan_of_cell.halving0.norm : plan_of_cell.norm0, n1 = plan_of_cell.norm1;
    std::vector<double> sum(C), dot(C);
    dots(g[0], cell.pre0, n0, sum.data(), dot.data());
    affine_back(n0, C, 1.0, sum.data(), dot.data(), gw);
    const Affine f0 = back_through(n0, C, 1.0, sum.data(), dot.data(), count(cell.pre0));
    if (plan_of_cell.halves0)
      pointwise_back(cell.in0, g0, halves(plan_of_cell.halving0, C), 2, n0, cell.pre0, g[0], f0, gw);
    else pointwise_back(cell.in0, g0, {{plan_of_cell.point0, 0, C, 0}}, 1, n0, cell.pre0, g[0], f0, gw);
    dots(g[1], cell.pre1, n1, sum.data(), dot.data());
    affine_back(n1, C, 1.0, sum.data(), dot.data(), gw);
    const Affine f1 = back_through(n1, C, 1.0, sum.data(), dot.data(), count(cell.pre1));
    pointwise_back(cell.in1, g1, {{plan_of_cell.point1, 0, C, 0}}, 1, n1, cell.pre1, g[1], f1, gw);
    arena->release(mark);
  }
"""
