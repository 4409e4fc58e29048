const keys = [...document.querySelectorAll(".keys .key")];
const colourOf = e => [...e.classList].find(c => /^c\d+$/.test(c));
const alone = [...document.querySelectorAll(".small > div > .key")];
const drawn = [...document.querySelectorAll(".charts svg *, .small svg *")].filter(e => colourOf(e) && !alone.includes(e.closest(".small > div")?.firstChild));
function bringForward() {
  const chosen = new Set(keys.filter(k => k.getAttribute("aria-pressed") === "true").map(colourOf));
  for (const e of drawn) e.classList.toggle("faded", chosen.size > 0 && !chosen.has(colourOf(e)));
  for (const name of alone) name.parentElement.hidden = chosen.size > 0 && !chosen.has(colourOf(name));
}
for (const key of keys) {
  const turn = () => { key.setAttribute("aria-pressed", String(key.getAttribute("aria-pressed") !== "true")); bringForward(); };
  key.tabIndex = 0;
  key.setAttribute("role", "button");
  key.setAttribute("aria-pressed", "false");
  key.addEventListener("click", turn);
  key.addEventListener("keydown", e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); turn(); } });
}
for (const e of document.querySelectorAll(".hint")) e.style.display = "inline";
