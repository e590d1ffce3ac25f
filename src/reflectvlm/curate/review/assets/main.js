// The page around the row.
const button = (name, text, does, kind = "") => make("button", { id: `do-${text.split(" ")[0].toLowerCase()}`, class: kind, onclick: does }, text, " ", key(name));

function drawFrame() {
  document.title = `${all.name} · review`;
  replace(byId("page"),
    make("header", {},
      make("div", { class: "bar" },
        make("b", { class: "name", title: `as ${all.by}` }, all.name),
        make("div", { id: "filters", class: "filters", role: "group", "aria-label": "Rows that are shown" }),
        make("input", { id: "words", type: "search", placeholder: "Search  /", "aria-label": "Search rows", maxlength: "500",
          onkeydown: (event) => { if (event.key === "Enter") { event.target.blur(); search(event.target.value); } },
          onsearch: (event) => { if (!event.target.value && chosen.found) search(""); } }),
        make("input", { id: "go", type: "text", inputmode: "numeric", placeholder: "Row  g", "aria-label": "Go to row number", size: "6",
          onkeydown: (event) => { if (event.key === "Enter") goTo(event.target); } }),
        make("button", { onclick: () => byId("help").showModal() }, "Help ", key("?")),
        make("button", { id: "finish-open", onclick: openFinish }, "Finish")),
      make("div", { class: "progress" }, make("div", { id: "bar", class: "track", role: "progressbar", "aria-label": "Rows decided", "aria-valuemin": "0" }), make("span", { id: "counts" }))),
    all.unread_count > 0 && make("details", { class: "unread" }, make("summary", {}, `${grouped(all.unread_count)} row${all.unread_count > 1 ? "s" : ""} cannot be shown`),
      make("ul", {}, ...all.unread.map((text) => make("li", {}, text)))),
    make("main", { id: "row", tabindex: "-1" },
      make("div", { id: "where", class: "where" }),
      make("div", { id: "pictures", class: "pictures" }),
      make("div", { id: "card", class: "card" })),
    make("footer", {},
      make("div", { class: "bar" },
        button("a", "Accept", () => decide("accept"), "accept"), button("f", "Fix", openEdit, "fix"), button("d", "Drop", () => decide("drop"), "drop"), button("u", "Undo", undo),
        make("span", { id: "said", role: "status", "aria-live": "polite" }),
        button("k", "Previous", () => walk(-1)), button("j", "Next", () => walk(1)))),
    zoomDialog(), helpDialog(), make("dialog", { id: "finish", "aria-labelledby": "finish-title" }));
}

// What can be done with the row as it is shown now.
function ready() {
  for (const name of ["accept", "fix", "drop"]) byId(`do-${name}`).disabled = edit.open || !seen.row.of;
  for (const name of ["undo", "previous", "next"]) byId(`do-${name}`).disabled = edit.open;
}

function drawProgress() {
  const count = (sign) => all.status.split(sign).length - 1;
  const total = all.status.length, a = count("a"), f = count("f"), d = count("d"), done = a + f + d;
  replace(byId("filters"), ...FILTERS.filter(([name]) => name !== "mixed" || all.mixed.includes("1")).map(([name, text]) =>
    make("button", { "aria-pressed": String(chosen.filter === name), onclick: () => filter(name) }, text, " ",
      make("span", { class: "n" }, grouped({ all: total, left: total - done, a, f, d, mixed: all.mixed.split("1").length - 1 }[name])))));
  const bar = byId("bar");
  replace(bar, ...[["accept", a], ["fix", f], ["drop", d]].map(([name, n]) => make("i", { class: name, vars: { width: `${(100 * n) / total}%` } })));
  bar.setAttribute("aria-valuemax", total);
  bar.setAttribute("aria-valuenow", done);
  byId("counts").textContent = `${grouped(done)} of ${grouped(total)} decided (${Math.floor((100 * done) / total)} %)`;
}

function goTo(input) {
  const place = Number(input.value) - 1;
  if (!Number.isInteger(place) || place < 0 || place >= all.status.length) return say(`There are rows 1 to ${grouped(all.status.length)}.`, "bad");
  input.value = "";
  input.blur();
  if (!edit.open) show(place);
}

function openFinish() {
  const left = all.status.split(".").length - 1, dialog = byId("finish");
  const kept = all.rest === "keep" ? "are kept as they are" : "are left out";
  const write = async (stop) => {
    try {
      const told = await ask("finish", { stop });
      replace(dialog, make("h2", { id: "finish-title" }, stop ? "Written. The review has ended." : "Written."), make("p", {}, told.told),
        stop ? make("p", { class: "faint" }, "You can close this page.") : make("button", { onclick: () => dialog.close() }, "Go on"));
    } catch (problem) {
      replace(dialog, make("h2", { id: "finish-title" }, "Not written"), make("p", { class: "bad" }, problem.message), make("button", { onclick: () => dialog.close() }, "Back"));
    }
  };
  replace(dialog, make("h2", { id: "finish-title" }, "Write the reviewed set"),
    make("p", {}, `Accepted and fixed rows go to ${all.out}.`),
    make("p", {}, left ? `${grouped(left)} row${left > 1 ? "s" : ""} nobody has decided about ${left > 1 ? kept : kept.replace("are", "is").replace("they are", "it is")}.` : "Every row is decided."),
    make("div", { class: "bar" }, make("button", { class: "main", autofocus: true, onclick: () => write(true) }, "Write and end"),
      make("button", { onclick: () => write(false) }, "Write and go on"), make("button", { onclick: () => dialog.close() }, "Back")));
  dialog.showModal();
}

async function begin() {
  Object.assign(all, await ask("state"));
  drawFrame();
  document.addEventListener("keydown", pressed);
  window.addEventListener("resize", () => byId("zoom").open && scaled());
  window.addEventListener("beforeunload", () => { if (edit.open) recheck({ keepalive: true }); });
  const asked = Number(location.hash.slice(1)) - 1;
  await show(Number.isInteger(asked) && asked >= 0 && asked < all.status.length ? asked : all.start);
  document.documentElement.setAttribute("data-ready", "");
}

begin().catch((problem) => replace(byId("page"), make("p", { class: "bad" }, problem.message)));
