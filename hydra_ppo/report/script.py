"""The page's own script: reading a chart, filtering samples, and asking for what is new. It holds no text of others."""

SCRIPT = """
"use strict";
const byId = id => document.getElementById(id);
function show(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size < 1e-4 || size >= 1e7 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}
function clear(svg) {
  svg.querySelector(".at").style.visibility = "hidden";
  const read = svg.closest(".chart").querySelector(".read");
  if (read.dataset.last !== undefined) read.textContent = read.dataset.last;
}
function lines(svg) {
  return [...svg.querySelectorAll("path[data-steps]")].map(path => ({
    label: path.dataset.label,
    steps: path.dataset.steps.split(" ").map(Number),
    values: path.dataset.values.split(" ").map(Number)}));
}
function read(svg, step) {
  const chart = svg.closest(".chart"), out = chart.querySelector(".read"), all = lines(svg);
  if (out.dataset.last === undefined) out.dataset.last = out.textContent;
  let near = null;
  for (const line of all) for (const at of line.steps)
    if (near === null || Math.abs(at - step) < Math.abs(near - step)) near = at;
  const found = [];
  for (const line of all) {
    const at = line.steps.indexOf(near);
    if (at >= 0) found.push((all.length > 1 ? line.label + " " : "") + show(line.values[at]));
  }
  out.textContent = "step " + near + ": " + found.join(", ");
  const first = Number(chart.dataset.first), last = Number(chart.dataset.last), mark = svg.querySelector(".at");
  const x = LEFT + (last === first ? 0.5 : (near - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
  mark.setAttribute("x1", x); mark.setAttribute("x2", x); mark.style.visibility = "visible";
  svg.dataset.step = near;
}
document.addEventListener("pointermove", event => {
  const svg = event.target.closest && event.target.closest(".chart[data-first] > svg");
  for (const other of document.querySelectorAll(".chart[data-first] > svg[data-step]"))
    if (other !== svg && other !== document.activeElement) { clear(other); delete other.dataset.step; }
  if (!svg) return;
  const chart = svg.closest(".chart"), box = svg.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * WIDTH;
  const first = Number(chart.dataset.first), last = Number(chart.dataset.last);
  read(svg, first + (x - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first));
});
document.addEventListener("keydown", event => {
  const svg = event.target.closest && event.target.closest(".chart[data-first] > svg");
  if (!svg || (event.key !== "ArrowLeft" && event.key !== "ArrowRight")) return;
  event.preventDefault();
  const steps = [...new Set(lines(svg).flatMap(line => line.steps))].sort((a, b) => a - b);
  const here = svg.dataset.step === undefined ? steps.length : steps.indexOf(Number(svg.dataset.step));
  read(svg, steps[Math.min(Math.max(here + (event.key === "ArrowLeft" ? -1 : 1), 0), steps.length - 1)]);
});
document.addEventListener("focusout", event => {
  const svg = event.target.closest && event.target.closest(".chart[data-first] > svg");
  if (svg) { clear(svg); delete svg.dataset.step; }
});
function filter() {
  const list = document.querySelector(".samples");
  if (!list || !byId("filter")) return;
  const wanted = byId("find").value.toLowerCase(), changed = byId("changed").checked, order = Number(byId("order").value);
  const all = [...list.children];
  all.forEach((item, at) => { if (item.dataset.at === undefined) item.dataset.at = at; });
  const worth = item => item.dataset.difference === "" ? Infinity : order * Number(item.dataset.difference);
  all.sort((a, b) => order && worth(a) !== worth(b) ? (worth(a) < worth(b) ? -1 : 1) : a.dataset.at - b.dataset.at);
  let count = 0;
  for (const item of all) {
    item.hidden = (changed && item.dataset.changed !== "1") || !item.textContent.toLowerCase().includes(wanted);
    count += item.hidden ? 0 : 1;
    list.append(item);
  }
  byId("count").textContent = count + " of " + all.length;
}
if (byId("filter")) {
  byId("filter").addEventListener("submit", event => event.preventDefault());
  byId("filter").addEventListener("input", filter);
  filter();
}
"""

LIVE_SCRIPT = """
const parts = new Map();
async function renew() {
  const status = byId("live");
  try {
    const answer = await fetch("parts", {cache: "no-store"});
    if (!answer.ok) throw new Error(String(answer.status));
    const found = await answer.json();
    for (const [name, html] of Object.entries(found.parts)) {
      const place = document.querySelector('[data-part="' + name + '"]');
      if (place && parts.get(name) !== html) {
        place.innerHTML = html;
        if (name === "samples") filter();
        parts.set(name, html);
      }
    }
    status.textContent = found.problem || "Live: looked at " + new Date().toLocaleTimeString();
  } catch (error) {
    status.textContent = "Not served any more; this is what was seen last.";
  }
  setTimeout(renew, EVERY);
}
renew();
"""


def script(left: float, right: float, width: float, every: float | None) -> str:
    """Return the script.

    Args:
        left, right, width: edges and width of a chart, in its own units.
        every: seconds between two looks at what is new; None never looks.
    """
    code = f"const LEFT = {left:g}, RIGHT = {right:g}, WIDTH = {width:g};\n" + SCRIPT
    return code if every is None else code + f"const EVERY = {1000 * every:g};\n" + LIVE_SCRIPT
