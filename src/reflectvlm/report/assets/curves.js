// Small multiples of all metrics: raw points light, their moving average bold, held-out rows as circles.
const BOX = { width: 320, height: 150, left: 44, right: 10, top: 10, bottom: 20 };
const smoothing = { on: true };
const panels = [];

function curvesSection() {
  const groups = new Map();
  for (const meta of DATA.panels) {
    if (!groups.has(meta.group)) groups.set(meta.group, []);
    groups.get(meta.group).push(meta);
  }
  const smooth = make("input", { type: "checkbox", checked: smoothing.on, onchange: () => { smoothing.on = smooth.checked; panels.forEach((panel) => panel.paint()); } });
  const section = make("section", { id: "curves", "aria-labelledby": "curves-title" },
    make("div", { class: "bar" },
      make("h2", { id: "curves-title" }, "Curves"),
      legend(),
      make("label", { class: "check" }, smooth, "smooth")),
    make("p", { class: "faint" }, "Move over a curve for its values at a step; a click lists the answers of that step."));
  for (const [name, metas] of groups) {
    const folded = name === "Time" || name === "More";
    const grid = make("div", { class: "panels" });
    const fill = () => { if (!grid.childElementCount) grid.append(...metas.map(panelOf)); };
    if (folded) section.append(make("details", { class: "group", ontoggle: fill }, make("summary", null, `${name} (${metas.length})`), grid));
    else { fill(); section.append(make("h3", null, name), grid); }
  }
  if (!DATA.panels.length) section.append(make("p", { class: "card" }, "No metrics are recorded yet."));
  return section;
}

function legend() {
  const dots = RUNS.map((run) => make("span", { class: `key run-${run.letter}` }, make("i", { class: "dot" }), TWO ? `${run.letter} · ${run.name}` : "training"));
  return make("span", { class: "legend" }, ...dots, make("span", { class: "key" }, make("i", { class: "ring" }), "held out"));
}

function panelOf(meta) {
  const lines = RUNS.flatMap((run) => [
    { run, held: false, series: run.series[meta.key] },
    { run, held: true, series: run.series[`eval/${meta.key}`] },
  ]).filter((line) => line.series && line.series[0].length);
  const values = make("span", { class: "values" });
  const svg = draw("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", tabindex: 0, "aria-label": spoken(meta, lines), class: "plot" });
  const node = make("figure", { class: "panel", "data-key": meta.key }, make("figcaption", null, make("b", null, meta.title), values), svg);
  const panel = { meta, lines, values, svg, ...scales(lines, meta.share), paint: () => paint(panel), show: (step) => show(panel, step) };
  svg.addEventListener("pointermove", (event) => panels.forEach((one) => one.show(stepAt(panel, event))));
  svg.addEventListener("pointerleave", () => panels.forEach((one) => one.show(null)));
  svg.addEventListener("click", (event) => chooseStep(stepAt(panel, event)));
  svg.addEventListener("keydown", (event) => panelKey(panel, event));
  svg.addEventListener("blur", () => panels.forEach((one) => one.show(null)));
  panels.push(panel);
  panel.paint();
  panel.show(null);
  return node;
}

function spoken(meta, lines) {
  const told = lines.map(({ run, held, series: [steps, ys] }) => `${TWO ? `${run.name}, ` : ""}${held ? "held out" : "training"}: ${number(ys[0])} at step ${steps[0]}, ${number(ys.at(-1))} at step ${steps.at(-1)}`);
  return `${meta.title}. ${told.join("; ")}`;
}

function scales(lines, share) {
  let [low, high, first, last] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const { series: [steps, ys] } of lines) {
    for (const y of ys) if (y !== null) { low = Math.min(low, y); high = Math.max(high, y); }
    first = Math.min(first, steps[0]);
    last = Math.max(last, steps.at(-1));
  }
  if (share && low >= 0 && high <= 1) [low, high] = [0, 1];
  if (low === high) { const pad = Math.abs(low) * 0.1 || 1; low -= pad; high += pad; }
  else if (!share) { const pad = 0.05 * (high - low); low -= pad; high += pad; }
  if (first === last) last = first + 1;
  const x = (step) => BOX.left + ((step - first) / (last - first)) * (BOX.width - BOX.left - BOX.right);
  const y = (value) => BOX.height - BOX.bottom - ((value - low) / (high - low)) * (BOX.height - BOX.top - BOX.bottom);
  return { x, y, low, high, first, last };
}

function paint(panel) {
  const { svg, x, y, lines, meta } = panel;
  replace(svg);
  for (const tick of ticks(panel.low, panel.high, panel.meta.share ? 2 : 4)) {
    svg.append(draw("line", { x1: BOX.left, x2: BOX.width - BOX.right, y1: y(tick), y2: y(tick), class: "grid" }),
      draw("text", { x: BOX.left - 6, y: y(tick) + 3.5, class: "tick end" }, meta.share ? percent(tick) : number(tick)));
  }
  for (const tick of ticks(panel.first, panel.last, 4).filter(Number.isInteger)) svg.append(draw("text", { x: x(tick), y: BOX.height - 5, class: "tick middle" }, grouped(tick)));
  for (const line of lines) svg.append(...(line.held ? circles(panel, line) : strokes(panel, line)));
  panel.cross = draw("g", { class: "cross" });
  svg.append(panel.cross);
}

function strokes({ x, y }, { run, series: [steps, ys] }) {
  const few = steps.length < 24;
  const bold = !smoothing.on || few ? ys : average(ys, Math.max(3, Math.floor(ys.length / 15) | 1));
  const made = [draw("path", { d: path(steps, bold, x, y), class: `line run-${run.letter}` })];
  if (smoothing.on && !few) made.unshift(draw("path", { d: path(steps, ys, x, y), class: `line raw run-${run.letter}` }));
  if (few) made.push(...steps.flatMap((step, i) => (ys[i] === null ? [] : [draw("circle", { cx: x(step), cy: y(ys[i]), r: 2.4, class: `dot run-${run.letter}` })])));
  return made;
}

function circles({ x, y }, { run, series: [steps, ys] }) {
  return [draw("path", { d: path(steps, ys, x, y), class: `line held run-${run.letter}` }),
    ...steps.flatMap((step, i) => (ys[i] === null ? [] : [draw("circle", { cx: x(step), cy: y(ys[i]), r: 3.2, class: `ring run-${run.letter}` })]))];
}

function path(steps, ys, x, y) {
  let text = "", pen = "M";
  for (let i = 0; i < steps.length; i++) {
    if (ys[i] === null) { pen = "M"; continue; }
    text += `${pen}${x(steps[i]).toFixed(1)} ${y(ys[i]).toFixed(1)}`;
    pen = "L";
  }
  return text;
}

// Mean of up to `window` values around each; at the ends of as many as there are.
function average(ys, window) {
  const half = window >> 1;
  return ys.map((y, i) => {
    const near = ys.slice(Math.max(0, i - half), i + half + 1).filter((one) => one !== null);
    return y === null || !near.length ? null : near.reduce((sum, one) => sum + one, 0) / near.length;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step) found.push(Math.abs(tick) < step * 1e-6 ? 0 : Number(tick.toPrecision(10)));
  return found;
}

function stepAt(panel, event) {
  const box = panel.svg.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * BOX.width;
  const share = (x - BOX.left) / (BOX.width - BOX.left - BOX.right);
  return Math.round(panel.first + Math.min(1, Math.max(0, share)) * (panel.last - panel.first));
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (steps[middle] <= step) low = middle; else high = middle; }
  return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
}

// The values of all lines at a step; null: the newest ones.
function show(panel, step) {
  panel.at = step;
  replace(panel.cross);
  const told = panel.lines.map(({ run, held, series: [steps, ys] }) => {
    const i = step === null ? steps.length - 1 : nearest(steps, step);
    if (step !== null && ys[i] !== null) panel.cross.append(draw("circle", { cx: panel.x(steps[i]), cy: panel.y(ys[i]), r: 3.5, class: `dot run-${run.letter}` }));
    const value = panel.meta.share ? percent(ys[i]) : number(ys[i]);
    return make("span", { class: `run-${run.letter}` }, make("i", { class: held ? "ring" : "dot" }), value);
  });
  if (step !== null) {
    panel.cross.prepend(draw("line", { x1: panel.x(step), x2: panel.x(step), y1: BOX.top, y2: BOX.height - BOX.bottom }));
    told.unshift(make("span", { class: "faint" }, `step ${grouped(step)}`));
  }
  replace(panel.values, ...told);
}

function panelKey(panel, event) {
  const jump = Math.max(1, Math.round((panel.last - panel.first) / 50));
  const moves = { ArrowLeft: -jump, ArrowRight: jump };
  if (event.key in moves) {
    const from = panel.at ?? (moves[event.key] < 0 ? panel.last : panel.first);
    const step = Math.min(panel.last, Math.max(panel.first, from + moves[event.key]));
    panels.forEach((one) => one.show(step));
  } else if (event.key === "Enter" && panel.at !== null) chooseStep(panel.at);
  else return;
  event.preventDefault();
}

function chooseStep(step) {
  const steps = [...new Set(RUNS[chosen.run].answers.step)].sort((a, b) => a - b);
  if (!steps.length) return;
  chosen.step = String(steps[nearest(steps, step)]);
  changed("filter");
  document.getElementById("answers").scrollIntoView({ block: "start" });
}
