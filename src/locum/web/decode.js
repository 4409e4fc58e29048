"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const make = (tag, text, kind) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (kind) e.className = kind; return e; };
let clock = null;
const panes = [...document.querySelectorAll(".pane")].map(root => {
  const head = make("header"), pick = make("select"), status = make("span"), text = make("div", "", "text"), hint = make("p", "", "hint");
  pick.setAttribute("aria-label", "method");
  data.methods.forEach(m => pick.append(new Option(m, m)));
  head.append(pick, status); root.append(head, text, hint);
  return { pick, status, text, hint, sample: null };
});
function fill(pane) {
  const sample = (data.samples[pane.pick.value] || {})[data.keys[byId("item").value]];
  pane.sample = sample; pane.text.replaceChildren(); pane.hint.textContent = "";
  if (!sample) { pane.status.textContent = "no text: it failed here"; return; }
  sample.pieces.forEach((piece, i) => {
    const span = make("span", piece, "k" + Math.min(sample.depth[i], 4));
    span.dataset.step = sample.step[i]; span.dataset.i = i;
    pane.text.append(span);
  });
  show(pane, Infinity);
}
function show(pane, seconds) {
  const s = pane.sample; if (!s) return;
  let steps = 0; while (steps < s.times.length && s.times[steps] <= seconds) steps++;
  let tokens = 0;
  for (const span of pane.text.children) { const hidden = +span.dataset.step >= steps; span.classList.toggle("later", hidden); tokens += !hidden; }
  const at = Math.min(seconds, s.times[s.times.length - 1] || 0);
  pane.status.textContent = tokens + " tokens, " + steps + " forwards, " + at.toFixed(2) + " s";
}
function point(pane, event) {
  const span = event.target.closest("span[data-step]"), s = pane.sample; if (!span || !s) return;
  const step = span.dataset.step, same = [...pane.text.children].filter(e => e.dataset.step === step);
  for (const e of pane.text.children) e.classList.toggle("same", e.dataset.step === step);
  const depth = s.depth[+span.dataset.i];
  pane.hint.textContent = "forward " + (+step + 1) + " of " + s.times.length + " gave " + same.length + (same.length > 1 ? " tokens; " : " token; ") +
    (depth ? "this is number " + depth + " of the draft that it accepted" : "this is the model's own");
}
function play() {
  const end = Math.max(...panes.map(p => p.sample ? p.sample.times[p.sample.times.length - 1] || 0 : 0));
  const pace = Math.max(1, end / 8), began = performance.now();
  const tick = () => {
    const at = (performance.now() - began) / 1000 * pace;
    panes.forEach(p => show(p, at >= end ? Infinity : at));
    clock = at < end ? requestAnimationFrame(tick) : null;
  };
  cancelAnimationFrame(clock); tick();
}
if (data.methods.length) {
  data.items.forEach((item, i) => byId("item").append(new Option(item.group + ": " + item.text.replace(/\s+/g, " ").slice(0, 60), i)));
  const ours = data.methods.filter(m => data.kinds[m] === "ours");
  panes[0].pick.value = ours[ours.length - 1] || data.methods[0];
  panes[1].pick.value = data.methods.includes("transformers") ? "transformers" : data.methods[data.methods.length - 1];
  const refresh = () => { cancelAnimationFrame(clock); byId("prompt").textContent = data.items[byId("item").value].text; panes.forEach(fill); };
  byId("item").addEventListener("change", refresh); byId("play").addEventListener("click", play);
  for (const p of panes) { p.pick.addEventListener("change", refresh); for (const e of ["mouseover", "click"]) p.text.addEventListener(e, event => point(p, event)); }
  refresh();
} else byId("samples").remove();
