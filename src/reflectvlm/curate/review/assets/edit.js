// Fixing a row: three texts, checked while somebody types. What is typed is kept as a draft on the disk.
const edit = { open: false, timer: 0, asked: 0, pending: null };
const PARTS = ["question", "answer", "trace"];

function openEdit() {
  if (!seen.row || edit.open) return;
  edit.open = true;
  ready();
  const start = (one) => seen.row.draft?.[one] ?? now(one);
  const area = (one, rows) => make("textarea", { id: `edit-${one}`, rows, spellcheck: "false", autocomplete: "off", oninput: typed, "aria-describedby": "edit-checks" });
  replace(byId("card"),
    ...PARTS.filter((one) => one !== "answer" || seen.row.has_answer).map((one) => make("section", {},
      make("label", { for: `edit-${one}` }, { question: "Question", answer: "Gold answer", trace: "Trace" }[one]),
      area(one, lines(start(one), one === "trace" ? 5 : 1, one === "trace" ? 18 : 5)))),
    make("div", { id: "edit-checks", class: "checks", role: "status" }),
    make("div", { class: "bar" },
      make("button", { id: "save", class: "main", onclick: saveEdit }, "Save fix ", key("Ctrl Enter")),
      make("button", { onclick: closeEdit }, "Close ", key("Esc")),
      make("button", { class: "plain", onclick: discardEdit }, "Discard the edit"),
      make("span", { class: "faint" }, "Closing keeps what you typed.")),
    part("As it will read", make("div", { id: "preview", class: "trace" })));
  for (const one of PARTS) if (byId(`edit-${one}`)) byId(`edit-${one}`).value = start(one);
  byId("edit-trace").focus();
  byId("edit-trace").setSelectionRange(0, 0);
  preview();
  drawChecks(byId("edit-checks"), null);
  recheck();
}

// As many lines as the text is likely to fill.
const lines = (text, least, most) => Math.min(most, Math.max(least, text.split("\n").reduce((sum, line) => sum + 1 + Math.floor(line.length / 80), 0)));
const editTexts = () => Object.fromEntries(PARTS.filter((one) => byId(`edit-${one}`)).map((one) => [one, byId(`edit-${one}`).value]));
const preview = () => replace(byId("preview"), ...coloured(byId("edit-trace").value));

function typed() {
  seen.anyway = "";
  preview();
  clearTimeout(edit.timer);
  edit.timer = setTimeout(() => recheck(), 120);
}

// One question at a time and only the newest: an older one that came late would put its draft over a newer one.
// `more` is for the last moment of the page, when there is no time to wait.
async function recheck(more) {
  clearTimeout(edit.timer);
  const number = ++edit.asked, { place } = seen.row, before = edit.pending, texts = editTexts();
  ahead.delete(place);
  edit.pending = (async () => {
    if (!more) await before?.catch(() => {});
    return more || number === edit.asked ? ask("check", { place, texts, draft: true }, more) : null;
  })();
  try {
    const checks = await edit.pending;
    if (checks && edit.open && number === edit.asked) drawChecks(byId("edit-checks"), checks);
  } catch (problem) {
    say(problem.message, "bad");
  }
}

async function saveEdit() {
  clearTimeout(edit.timer);
  await edit.pending?.catch(() => {});
  await decide("fix", editTexts());
}

async function closeEdit() {
  if (!edit.open) return;
  await recheck();
  await leaveEdit();
}

async function discardEdit() {
  clearTimeout(edit.timer);
  edit.asked += 1;
  await edit.pending?.catch(() => {});
  try {
    await ask("draft", { place: seen.row.place, texts: null });
  } catch (problem) {
    return say(problem.message, "bad");
  }
  await leaveEdit();
}

async function leaveEdit() {
  edit.open = false;
  edit.asked += 1;
  await show(seen.row.place, true);
}
