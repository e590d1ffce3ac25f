// The answers: filters, and a list of which only what is seen exists.
const ROW = 68;
const rows = make("div", { class: "rows", id: "rows", role: "listbox", tabindex: 0, "aria-label": "Answers" });
const space = make("div", { class: "space", role: "presentation" });
const count = make("span", { class: "count faint", role: "status", "aria-live": "polite" });
let shown = [];

function answersSection() {
  rows.append(space);
  rows.classList.toggle("bare", !DATA.images.some(Boolean));
  rows.addEventListener("scroll", onScroll, { passive: true });
  rows.addEventListener("keydown", listKey);
  rows.addEventListener("click", (event) => {
    const node = event.target.closest("[data-place]");
    if (node) pick(Number(node.dataset.place));
  });
  new ResizeObserver(drawRows).observe(rows);
  return make("section", { id: "answers", "aria-labelledby": "answers-title" },
    make("div", { class: "bar" }, make("h2", { id: "answers-title" }, "Answers"), count, colours()),
    filters(), make("div", { class: "split" }, rows, pane));
}

function filters() {
  const search = make("input", { type: "search", id: "search", placeholder: "Search questions and answers  ( / )", "aria-label": "Search questions and answers", oninput: () => { chosen.text = search.value; changed("filter"); } });
  const node = make("div", { class: "filters", role: "group", "aria-label": "Filters" }, search);
  if (TWO) node.append(segments("Answers of", RUNS.map((run) => [String(run.place), run.letter, run.name]), () => String(chosen.run), (value) => { Object.assign(chosen, { run: Number(value), answer: -1, step: "all" }); changed("filter"); }));
  for (const flag of FLAGS.filter((one) => one.there())) node.append(toggle(flag));
  node.append(chooser("Rows", kinds, () => chosen.kind, (value) => { chosen.kind = value; }),
    chooser("Step", steps, () => chosen.step, (value) => { chosen.step = value; }),
    chooser("Sort", () => Object.entries(SORTS).map(([key, [label]]) => [key, label]), () => chosen.sort, (value) => { chosen.sort = value; }),
    make("button", { type: "button", class: "plain", onclick: () => { Object.assign(chosen, { text: "", flags: new Set(), kind: "all", step: "all", sort: "run" }); search.value = ""; changed("filter"); } }, "Clear"));
  return node;
}

function colours() {
  const told = Object.entries(COLOURS).filter(([key]) => key !== "look" || RUNS.some((run) => Object.keys(run.heats).length));
  return make("span", { class: "colours" }, make("span", { class: "faint" }, "colour tokens by "),
    segments("Colour tokens by", told.map(([key, label]) => [key, label, `Colour tokens by ${label.toLowerCase()}`]), () => chosen.colour, (value) => { chosen.colour = value; changed("colour"); }));
}

const kinds = () => [["all", "All rows"], ["held", "Held out"], ["train", "Training"]];
const steps = () => [["all", "All steps"], ...[...new Set(RUNS[chosen.run].answers.step)].sort((a, b) => a - b).map((step) => [String(step), `Step ${step}`])];

function toggle(flag) {
  const node = make("button", { type: "button", class: "toggle", "data-flag": flag.name, title: flag.title, onclick: () => {
    if (!chosen.flags.delete(flag.name)) chosen.flags.add(flag.name);
    changed("filter");
  } });
  const update = () => { node.textContent = flag.label(); node.setAttribute("aria-pressed", String(chosen.flags.has(flag.name))); };
  listeners.push(update);
  update();
  return node;
}

function chooser(label, options, get, set) {
  const node = make("select", { "aria-label": label, onchange: () => { set(node.value); changed("filter"); } });
  const update = () => {
    const found = options();
    if (!found.some(([value]) => value === get())) set("all");
    replace(node, ...found.map(([value, text]) => make("option", { value }, text)));
    node.value = get();
  };
  listeners.push(update);
  update();
  return node;
}

function segments(label, options, get, set) {
  const buttons = options.map(([value, text, title]) => make("button", { type: "button", title, "data-value": value, onclick: () => set(value) }, text));
  const update = () => buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.value === get())));
  listeners.push(update);
  update();
  return make("div", { class: "segments", role: "group", "aria-label": label }, ...buttons);
}

// -- the list -----------------------------------------------------------------------------------------

function filterRows() {
  shown = shownAnswers();
  const all = RUNS[chosen.run].size, left = RUNS[chosen.run].answersLeftOut;
  count.textContent = `${grouped(shown.length)} of ${grouped(all)}` + (left ? `; ${grouped(left)} more are in samples.jsonl` : "") + (DATA.imagesLeftOut ? `; ${grouped(DATA.imagesLeftOut)} pictures had no room` : "");
  space.style.height = `${shown.length * ROW}px`;
  if (!shown.includes(chosen.answer)) chosen.answer = shown.length ? shown[0] : -1;
  rows.scrollTop = 0;
  drawRows();
  showAnswer();
}

let waiting = false;
function onScroll() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; drawRows(); });
}

function drawRows() {
  const from = Math.max(0, Math.floor(rows.scrollTop / ROW) - 4);
  const to = Math.min(shown.length, Math.ceil((rows.scrollTop + rows.clientHeight) / ROW) + 4);
  const run = RUNS[chosen.run];
  const drawn = [];
  for (let place = from; place < to; place++) drawn.push(rowNode(run, shown[place], place));
  replace(space, ...drawn);
  const place = shown.indexOf(chosen.answer);
  if (place >= from && place < to) rows.setAttribute("aria-activedescendant", `row-${place}`);
  else rows.removeAttribute("aria-activedescendant");
  if (!shown.length) space.append(make("p", { class: "faint empty" }, run.size ? "No answer passes these filters." : "No answers are recorded yet."));
}

function rowNode(run, i, place) {
  const { answers } = run;
  const [, question, , images] = run.prompt(i);
  const said = verdict(run, i);
  const source = images.length && DATA.images[images[0]];
  return make("div", { class: `row ${said.class}`, id: `row-${place}`, role: "option", "data-place": place, "aria-selected": String(i === chosen.answer), "aria-setsize": shown.length, "aria-posinset": place + 1, vars: { top: `${place * ROW}px` } },
    source ? make("img", { src: source, alt: "", draggable: "false" }) : DATA.images.some(Boolean) && make("span", { class: "noimage" }),
    make("div", { class: "words" }, make("div", { class: "q" }, question.replaceAll("<image>", "").trim()), make("div", { class: "a" }, ending(answers.text[i]))),
    make("div", { class: "meta" }, make("b", { class: said.class }, said.text ? `${said.mark} ${number(answers.reward[i], 2)}` : said.mark),
      make("span", { class: "faint" }, `step ${answers.step[i]}`), make("span", { class: "faint" }, `${answers.length[i]} tok${run.looked(i) ? "" : " · no look"}`)));
}

const ending = (text) => (text.length > 34 ? `…${text.slice(-32)}` : text).replaceAll("\n", " ");

function pick(place) {
  if (place < 0 || place >= shown.length) return;
  chosen.answer = shown[place];
  changed("answer");
}

function reveal(place) {
  const top = place * ROW;
  if (top < rows.scrollTop) rows.scrollTop = top;
  else if (top + ROW > rows.scrollTop + rows.clientHeight) rows.scrollTop = top + ROW - rows.clientHeight;
}

function listKey(event) {
  const place = shown.indexOf(chosen.answer), page = Math.max(1, Math.floor(rows.clientHeight / ROW) - 1);
  const moves = { ArrowDown: place + 1, ArrowUp: place - 1, PageDown: place + page, PageUp: place - page, Home: 0, End: shown.length - 1, j: place + 1, k: place - 1 };
  if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  pick(Math.max(0, Math.min(shown.length - 1, moves[event.key])));
}

listeners.push((what) => {
  if (what === "filter") filterRows();
  else if (what === "answer") { const place = shown.indexOf(chosen.answer); if (place >= 0) reveal(place); drawRows(); showAnswer(); }
  else if (what === "colour") showAnswer();
});
