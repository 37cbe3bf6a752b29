"""What the page looks like and what its script adds; text, because a Flower bundle carries Python files alone."""

from fedmetanas_core.output.report.charts import COLOURS

STYLE = """
:root { color-scheme: light dark; --ground:#fff; --ink:#1d2129; --soft:#5b6470; --line:#d9dde3; --card:#f6f7f9;
  --s0:#1f6fb4; --s1:#c2571a; --s2:#16806a; --s3:#7a4fb5; --s4:#a8323e; --s5:#5f6670; --heat:#1f6fb4;
  --gone:#e3e5e8; --quiet:#f1f3f5; --found:#e6f2ea; --edge:#0003; }
@media (prefers-color-scheme: dark) { :root { --ground:#15181d; --ink:#e8eaed; --soft:#a2abb7; --line:#343a43;
  --card:#1e2228; --s0:#6cb4f0; --s1:#f0a070; --s2:#5cc9af; --s3:#b99af0; --s4:#ef8b95; --s5:#a5adb8;
  --heat:#6cb4f0; --gone:#2c3138; --quiet:#1d2127; --found:#1a2a22; --edge:#fff4; } }
* { box-sizing:border-box }
[hidden] { display:none !important }
body { margin:0 auto; max-width:72rem; padding:1rem; background:var(--ground); color:var(--ink); font:16px/1.5
  system-ui,sans-serif; overflow-wrap:anywhere }
h1 { font-size:1.5rem; margin:.2rem 0 }
h2 { font-size:1.15rem; margin:2.2rem 0 .6rem }
h3 { font-size:1rem; margin:.8rem 0 .2rem }
p { margin:.4rem 0; max-width:48rem }
.soft, figcaption { color:var(--soft); font-size:.9rem }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr)); gap:.6rem; margin:1rem 0 }
.card { background:var(--card); border:1px solid var(--line); border-radius:.5rem; padding:.6rem .8rem }
.card b { display:block; font-size:1.35rem; line-height:1.25 }
.card span { color:var(--soft); font-size:.85rem }
.state { display:inline-block; border-radius:1rem; padding:0 .7rem; font-size:.85rem; border:1px solid
  var(--line) }
.state.completed { background:var(--found) }
.state.failed, .state.interrupted { color:var(--s4); border-color:var(--s4) }
.two { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr)); gap:1rem }
figure { margin:0 }
.chart > svg, .map { width:100%; height:auto; display:block }
.wide { overflow-x:auto; background:
  linear-gradient(to right, var(--ground) 40%, transparent) left/2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--ground) 40%, transparent) right/2.5rem 100% no-repeat local,
  radial-gradient(farthest-side at 0 50%, var(--edge), transparent) left/.9rem 100% no-repeat scroll,
  radial-gradient(farthest-side at 100% 50%, var(--edge), transparent) right/.9rem 100% no-repeat scroll }
.wide > .map { min-width:52rem }
.wide .genotype-drawing .ground { fill:none }
.wide > svg { max-width:100%; height:auto }
table { border-collapse:collapse; font-size:.9rem }
th, td { text-align:left; padding:.25rem .9rem .25rem 0; border-bottom:1px solid var(--line); vertical-align:top;
  overflow-wrap:normal; max-width:32rem }
th, .number { white-space:nowrap }
.number { text-align:right; font-variant-numeric:tabular-nums }
td:last-child:not(.number) { min-width:9rem }
.long td { overflow-wrap:anywhere }
.long td:first-child { white-space:nowrap }
pre { background:var(--card); border:1px solid var(--line); border-radius:.5rem; padding:.7rem; overflow-x:auto;
  white-space:pre-wrap; font-size:.85rem }
summary { cursor:pointer }
.maps { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr)); gap:.8rem }
svg text { font:11px system-ui,sans-serif; fill:var(--soft) }
.tick { text-anchor:middle }
.tick.left { text-anchor:end }
.axis { text-anchor:middle }
.grid { stroke:var(--line); stroke-width:1; fill:none }
.phase { font-size:10px }
.line { fill:none; stroke-width:1.8; stroke-linejoin:round }
.line.s1 { stroke-dasharray:7 3 }
.line.d1 { stroke-dasharray:2 3 }
.line.d2 { stroke-dasharray:10 3 2 3 }
.bar { fill:var(--s0) }
.mean { stroke:var(--s1); stroke-width:2; stroke-dasharray:5 4 }
.span { fill:transparent }
.span.warm-up, .span.warm-start { fill:var(--quiet) }
.span.one-hot, .span.retraining { fill:var(--found) }
.heat { fill:var(--heat) }
.gone { fill:var(--gone) }
.heat:hover, .gone:hover, .bar:hover { stroke:var(--ink); stroke-width:1 }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:.2rem 1rem; margin:.2rem 0 0; padding:0;
  font-size:.85rem }
.key { width:1.7rem; height:.4rem; margin-right:.4rem; vertical-align:middle }
.key.ground { height:.7rem; border:1px solid var(--line) }
.ramp { display:inline-block; width:6rem; height:.7rem; margin:0 .3rem; border:1px solid var(--line);
  background:linear-gradient(to right, transparent, var(--heat)) }
.ramp.gone { width:1.5rem; background:var(--gone) }
dt { font-weight:600; margin-top:.5rem }
dd { margin:0; max-width:48rem }
.reading { position:fixed; pointer-events:none; background:var(--ground); border:1px solid var(--line);
  border-radius:.4rem; padding:.25rem .5rem; font-size:.8rem; box-shadow:0 2px 8px #0003; white-space:pre;
  z-index:2 }
.rule { stroke:var(--soft); stroke-dasharray:2 3 }
.toggle { display:inline-flex; gap:.9rem; font-size:.9rem; margin:.2rem 0 .6rem }
.toggle label { cursor:pointer }
""" + "".join(
    f".line.s{number}{{stroke:var(--s{number})}} .dot.s{number}{{fill:var(--s{number})}} " for number in range(COLOURS)
)

SCRIPT = """
"use strict";
const box = document.createElement("div");
box.className = "reading"; box.hidden = true; document.body.append(box);
for (const chart of document.querySelectorAll("svg[data-chart]")) {
  const facts = JSON.parse(chart.dataset.chart);
  const rule = document.createElementNS("http://www.w3.org/2000/svg", "path");
  rule.setAttribute("class", "rule"); chart.append(rule);
  const show = event => {
    const frame = chart.getBoundingClientRect(), view = chart.viewBox.baseVal;
    const at = (event.clientX - frame.left) / frame.width * view.width;
    const share = Math.min(1, Math.max(0, (at - facts.left) / (facts.right - facts.left)));
    const round = facts.low + share * (facts.high - facts.low);
    const closer = (a, b) => Math.abs(b[0] - round) < Math.abs(a[0] - round) ? b : a;
    const near = facts.series.map(one => one.points.reduce(closer, one.points[0]));
    const first = near.find(point => point);
    if (!first) return;
    const along = facts.high > facts.low ? (first[0] - facts.low) / (facts.high - facts.low) : 0;
    const x = facts.left + along * (facts.right - facts.left);
    rule.setAttribute("d", `M${x} ${facts.top}V${facts.bottom}`);
    const said = (one, point) => `${one.name}: ${+point[1].toPrecision(4)} (round ${point[0]})`;
    box.textContent = facts.series.map((one, i) => near[i] ? said(one, near[i]) : "").filter(Boolean).join("\\n");
    box.hidden = false;
    const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 6);
    box.style.left = `${Math.max(6, left)}px`;
    box.style.top = `${Math.max(6, event.clientY - box.offsetHeight - 10)}px`;
  };
  chart.addEventListener("pointermove", show);
  chart.addEventListener("pointerdown", show);
  chart.addEventListener("pointerleave", () => { box.hidden = true; rule.removeAttribute("d"); });
}
for (const group of document.querySelectorAll("[data-toggle]")) {
  const parts = [...document.querySelectorAll(`[data-part="${group.dataset.toggle}"]`)];
  const choose = name => parts.forEach(part => { part.hidden = name !== "all" && part.dataset.name !== name; });
  group.hidden = false;
  group.addEventListener("change", event => choose(event.target.value));
}
"""
