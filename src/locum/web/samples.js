"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const make = (tag, text, kind) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (kind) e.className = kind; return e; };
const root = document.getElementById("samples");
function answer(who, text, reward) {
  const box = make("div", "", "answer");
  box.dataset.who = who;
  if (reward !== null && reward !== undefined) {
    const shown = (reward > 0 ? "+" : "") + reward.toFixed(2);
    box.append(make("span", shown, "reward" + (reward > 0.05 ? " up" : reward < -0.05 ? " down" : "")));
  }
  box.append(document.createTextNode(text.trim() || "(nothing)"));
  return box;
}
for (const group of data.groups) {
  const methods = data.methods.filter(m => group.after[m]);
  const block = make("div"), heads = make("div", "", "heads"), list = make("div");
  heads.append(make("span", data.start));
  const picks = [methods.includes(data.baseline) ? data.baseline : methods[0], group.shown].map(chosen => {
    const pick = make("select");
    pick.setAttribute("aria-label", "method");
    methods.forEach(m => pick.append(new Option(m, m)));
    pick.value = chosen;
    heads.append(pick);
    return pick;
  });
  const fill = () => list.replaceChildren(...group.before.map((row, i) => {
    const line = make("div", "", "sample");
    line.append(make("div", row.prompt, "asked"), answer(data.start, row.text, row.reward));
    for (const pick of picks) { const s = group.after[pick.value][i]; line.append(answer(pick.value, s.text, s.reward)); }
    return line;
  }));
  picks.forEach(pick => pick.addEventListener("change", fill));
  block.append(make("h3", group.name));
  if (group.note) block.append(make("p", group.note, "note"));
  block.append(heads, list);
  root.append(block);
  fill();
}
if (!data.groups.length) root.remove();
