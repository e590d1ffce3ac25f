// The table before and after, and the settings; two runs beside each other.
function resultSection() {
  const labels = [...new Set(RUNS.flatMap((run) => run.table.map((row) => row[0])))];
  const section = make("section", { id: "result", "aria-labelledby": "result-title" }, make("div", { class: "bar" }, make("h2", { id: "result-title" }, "Result"), make("span", { class: "faint" }, "held-out rows, greedy answers")));
  const open = RUNS.filter((run) => !run.table.length);
  if (open.length) section.append(make("p", { class: "faint" }, ...open.map((run) => `${run.name}: ${run.finished ? "no evaluation before and after" : "not finished, so there is no table yet"}. `)));
  if (!labels.length) return section;
  const head = make("tr", null, make("th", { scope: "col" }, "metric"), ...RUNS.flatMap((run) => ["before", "after", "change"].map((name) => make("th", { scope: "col", class: TWO ? `num run-${run.letter}` : "num" }, TWO ? `${run.letter} ${name}` : name))));
  const body = labels.map((label) => make("tr", null, make("th", { scope: "row" }, label), ...RUNS.flatMap((run) => cells(run, label))));
  section.append(make("div", { class: "card scroll" }, make("table", { class: "result" }, make("thead", null, head), make("tbody", null, ...body))), ...labels.flatMap(notesOf));
  return section;
}

// What a row is about in each run, below the table; it stands over the cells too.
function notesOf(label) {
  return RUNS.filter((run) => run.notes[label]).map((run) => make("p", { class: "faint note" }, `${label}${TWO ? `, ${run.letter}` : ""}: ${run.notes[label]}`));
}

function cells(run, label) {
  const row = run.table.find((one) => one[0] === label) || [label, "–", "–", ""];
  return [1, 2, 3].map((i) => make("td", { class: i === 2 ? "num strong" : i === 3 ? "num faint" : "num", title: run.notes[label] }, row[i]));
}

function settingsSection() {
  const maps = RUNS.map((run) => new Map([...run.facts.map(([key, value]) => [`· ${key}`, value]), ...run.settings]));
  const keys = [...new Set(maps.flatMap((map) => [...map.keys()]))];
  const differs = (key) => TWO && (maps[0].get(key) ?? "") !== (maps[1].get(key) ?? "");
  const only = make("input", { type: "checkbox", checked: TWO, onchange: () => fill() });
  const search = make("input", { type: "search", placeholder: "Search settings", "aria-label": "Search settings", oninput: () => fill() });
  const body = make("tbody");
  const note = make("p", { class: "faint" });
  function fill() {
    const word = search.value.trim().toLowerCase();
    const kept = keys.filter((key) => (!TWO || !only.checked || differs(key)) && (!word || key.toLowerCase().includes(word) || maps.some((map) => (map.get(key) ?? "").toLowerCase().includes(word))));
    replace(body, ...kept.map((key) => make("tr", { class: differs(key) ? "differs" : null }, make("th", { scope: "row" }, key), ...maps.map((map) => make("td", null, map.get(key) ?? "–")))));
    note.textContent = kept.length ? "" : TWO && only.checked && !word ? "No setting differs." : "Nothing is found.";
  }
  fill();
  const head = make("tr", null, make("th", { scope: "col" }, "key"), ...RUNS.map((run) => make("th", { scope: "col", class: `run-${run.letter}` }, run.name)));
  const overrides = RUNS.filter((run) => run.overrides.length).map((run) => make("p", null, make("b", null, TWO ? `${run.name}: ` : "Overrides: "), make("code", null, run.overrides.join(" "))));
  return make("section", { id: "settings", "aria-labelledby": "settings-title" },
    make("div", { class: "bar" }, make("h2", { id: "settings-title" }, "Settings"), search, TWO && make("label", { class: "check" }, only, "only what differs")),
    ...overrides,
    make("details", { open: TWO }, make("summary", null, `Recipe and machine (${keys.length})`), note, make("div", { class: "card scroll" }, make("table", { class: "settings" }, make("thead", null, head), body))));
}
