// Keys. Letters can be switched off for those whose tools send letters of their own.
const KEYS = [
  ["a", "accept the row", () => decide("accept")],
  ["f", "fix it: edit question, answer and trace", () => openEdit()],
  ["d", "drop it", () => decide("drop")],
  ["u", "undo the last decision, also one of an earlier session", () => undo()],
  ["j", "next row (also →)", () => walk(1)],
  ["k", "previous row (also ←)", () => walk(-1)],
  ["z", "enlarge the image; + − 0 zoom, arrows move, n next image", () => seen.row.images && openZoom(seen.row.place, 0)],
  ["/", "search; Enter finds, Esc leaves", () => byId("words").select()],
  ["g", "go to a row by its number", () => byId("go").select()],
  ["?", "this help", () => byId("help").showModal()],
];
const ONCE = new Set(["a", "d", "u"]);
const letters = { on: true };

function pressed(event) {
  if (document.querySelector("dialog[open]") || event.altKey) return;
  // Until the next frame the focus may still be in a dialog that has just been closed.
  const typing = /^(input|select|textarea)$/i.test(event.target.tagName) && !event.target.closest("dialog:not([open])");
  if (edit.open) {
    if (event.key === "Escape") closeEdit();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { if (!event.repeat) saveEdit(); }
    else return;
    return event.preventDefault();
  }
  if (event.ctrlKey || event.metaKey) return;
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const name = { ArrowRight: "j", ArrowLeft: "k" }[event.key] ?? event.key;
  const found = KEYS.find(([one]) => one === name);
  if (!found || (!letters.on && /^[a-z]$/.test(event.key))) return;
  event.preventDefault();
  // A key held down would decide about rows that nobody has seen.
  if (!(event.repeat && ONCE.has(name))) found[2]();
}

function helpDialog() {
  return make("dialog", { id: "help", "aria-labelledby": "help-title" },
    make("h2", { id: "help-title" }, "Keys"),
    make("table", {}, make("tbody", {}, ...KEYS.map(([name, text]) => make("tr", {}, make("th", { scope: "row" }, key(name)), make("td", {}, text))),
      make("tr", {}, make("th", { scope: "row" }, key("Ctrl Enter")), make("td", {}, "while editing: save the fix")),
      make("tr", {}, make("th", { scope: "row" }, key("Esc")), make("td", {}, "while editing: close; what is typed is kept")))),
    make("p", { class: "faint" }, "Each decision is on the disk before the next row comes. A row that the checks are against needs its key twice."),
    make("label", { class: "option" }, make("input", { type: "checkbox", checked: true, onchange: (event) => { letters.on = event.target.checked; } }), " single letters as keys"),
    make("form", { method: "dialog" }, make("button", { class: "main", autofocus: true }, "Close")));
}
