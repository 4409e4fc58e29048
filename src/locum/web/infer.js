"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.getElementById("zips"), pen = document.getElementById("pen");
const make = (tag, text, kind) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (kind) e.className = kind; return e; };
const draw = (tag, attributes, text) => {
  const e = document.createElementNS(pen.namespaceURI, tag);
  for (const name in attributes) e.setAttribute(name, attributes[name]);
  if (text !== undefined) e.textContent = text;
  return e;
};
const WIDTH = 260, ZIP = 250, HIST = 58, FOOT = 20, GAP = 8, BINS = 26;
const choose = (label, names) => {
  const pick = make("select"), box = make("label", label);
  names.forEach((name, i) => pick.append(new Option(name, i)));
  box.append(pick);
  return [box, pick];
};
const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
function axis(group, j) {
  // Wide enough for nearly all intervals of the methods that cover best; further ones are cut off at the edge.
  const ends = group.methods.flatMap(m => m.error[j].map((e, i) => Math.abs(e) + data.z * m.se[j][i])).sort((a, b) => a - b);
  const base = group.methods.find(m => m.name === data.baseline) || group.methods[0];
  const own = base.error[j].map((e, i) => Math.abs(e) + data.z * base.se[j][i]).sort((a, b) => a - b);
  return Math.min(quantile(ends, 0.995) || 1, 1.6 * (quantile(own, 0.98) || 1)) * 1.04;
}
function ticks(centre, half) {
  const power = 10 ** Math.floor(Math.log10(half)), step = [0.2, 0.5, 1, 2, 5].map(k => k * power).find(s => 2 * half / s <= 5) || power;
  const out = [];
  for (let k = Math.ceil((centre - half) / step); k * step <= centre + half; k++) out.push(Number((k * step).toPrecision(6)));
  return out;
}
function counts(errors, half) {
  const bins = new Array(BINS).fill(0);
  for (const e of errors) if (Math.abs(e) < half) bins[Math.floor((e + half) / (2 * half) * BINS)]++;
  return bins.map(n => n / Math.max(1, errors.length));
}
function panel(group, m, j, half, top) {
  const at = e => Math.max(0, Math.min(WIDTH, (e + half) / (2 * half) * WIDTH)), truth = group.truth[j];
  const figure = make("figure", undefined, m.kind), caption = make("figcaption"), share = m.held[j] / m.of;
  const told = make("span", (100 * share).toFixed(1) + " %, " + m.held[j] + " of " + m.of);
  caption.append(make("b", m.name), told);
  caption.firstChild.title = m.name;
  const svg = draw("svg", { viewBox: "0 0 " + WIDTH + " " + (ZIP + GAP + HIST + FOOT), role: "img", "aria-label": m.name + ": intervals of " + group.coefficients[j] });
  const order = m.error[j].map((e, i) => [Math.abs(e) / m.se[j][i], e, data.z * m.se[j][i]]).sort((a, b) => b[0] - a[0]);
  const kinds = { in: "", out: "" };
  order.forEach(([far, e, reach], i) => {
    const y = ((i + 0.5) / order.length * ZIP).toFixed(1);
    if (e - reach < half && e + reach > -half) kinds[far > data.z ? "out" : "in"] += "M" + (at(e - reach).toFixed(1)) + " " + y + "H" + (at(e + reach).toFixed(1));
    else kinds.out += e > 0 ? "M" + (WIDTH - 5) + " " + y + "H" + WIDTH : "M0 " + y + "H5";
  });
  const thick = Math.min(3, Math.max(0.9, 0.8 * ZIP / order.length));
  for (const kind in kinds) svg.append(draw("path", { class: kind, d: kinds[kind] || "M0 0", style: "stroke-width:" + thick }));
  const level = (1 - data.nominal) * ZIP, floor = ZIP + GAP + HIST;
  svg.append(draw("path", { class: "level", d: "M0 " + level + "H" + WIDTH }));
  const base = group.methods.find(o => o.name === data.baseline);
  const height = bins => bins.map(n => Math.min(1, n / top) * HIST), wide = WIDTH / BINS;
  height(counts(m.error[j], half)).forEach((h, i) => { if (h) svg.append(draw("rect", { class: "hist", x: (i * wide).toFixed(1), y: (floor - h).toFixed(1), width: (wide - 0.6).toFixed(1), height: h.toFixed(1) })); });
  if (base && base !== m) svg.append(draw("path", { class: "outline", d: "M0 " + floor + height(counts(base.error[j], half)).map((h, i) => "V" + ((floor - h).toFixed(1)) + "H" + (((i + 1) * wide).toFixed(1))).join("") + "V" + floor }));
  svg.append(draw("path", { class: "floor", d: "M0 " + floor + "H" + WIDTH }), draw("path", { class: "true", d: "M" + (WIDTH / 2) + " 0V" + floor }));
  for (const t of ticks(truth, half)) {
    const x = at(t - truth);
    if (x > 12 && x < WIDTH - 12) svg.append(draw("text", { class: "tick", x: x.toFixed(1), y: floor + 14, "text-anchor": "middle" }, String(t).replace("-", "−")));
  }
  figure.append(caption, svg);
  return figure;
}
if (data.groups.length) {
  const controls = make("div", undefined, "controls"), grid = make("div", undefined, "zips");
  const [groupBox, groupPick] = choose("data ", data.groups.map(g => g.name));
  let [box, pick] = choose("coefficient ", data.groups[0].coefficients);
  const fill = () => {
    const group = data.groups[groupPick.value], j = Number(pick.value), half = axis(group, j);
    const spread = group.methods.filter(m => m.kind !== "plain" || m.name === data.baseline);
    const top = Math.max(...spread.flatMap(m => counts(m.error[j], half)), 0.05) * 1.1;
    grid.replaceChildren(...group.methods.map(m => panel(group, m, j, half, top)));
  };
  const turn = () => {
    const before = pick.value, [next, made] = choose("coefficient ", data.groups[groupPick.value].coefficients);
    if (made.options[before]) made.value = before;
    box.replaceWith(next);
    [box, pick] = [next, made];
    pick.addEventListener("change", fill);
    fill();
  };
  groupPick.addEventListener("change", turn);
  pick.addEventListener("change", fill);
  controls.append(groupBox, box);
  root.append(controls, grid);
  const wide = data.groups[0].coefficients.length - 1;
  pick.value = String(wide > 1 ? 1 : wide);
  fill();
} else root.remove();
