// From row to row, and the decisions about them.
const all = { status: "", mixed: "", standing: 0, name: "" };
const seen = { row: null, checks: null, anyway: "", over: false, busy: false };
const chosen = { filter: "all", words: "", found: null };

const FILTERS = [
  ["all", "All", () => true],
  ["left", "Undecided", (place) => all.status[place] === "."],
  ["a", "Accepted", (place) => all.status[place] === "a"],
  ["f", "Fixed", (place) => all.status[place] === "f"],
  ["d", "Dropped", (place) => all.status[place] === "d"],
  ["mixed", "Judges disagree", (place) => all.mixed[place] === "1"],
];
const passes = (place) => FILTERS.find(([name]) => name === chosen.filter)[2](place) && (!chosen.found || chosen.found.has(place));

// The next row in a direction that passes the filter, or -1.
function next(from, step, wanted = passes) {
  for (let place = from + step; place >= 0 && place < all.status.length; place += step) if (wanted(place)) return place;
  return -1;
}

async function show(place, fresh = false) {
  if (fresh) ahead.delete(place);
  seen.busy = true;
  try {
    seen.row = await fetchRow(place);
  } catch (problem) {
    if (problem.status === 0) return say(problem.message, "bad");
    // A row that cannot be read any more can still be passed by.
    seen.row = { place, id: "", position: "", question: problem.message, answer: "", trace: "", images: 0, votes: [], first_votes: [], first_answer: "", others: [], decision: null, draft: null, why: "" };
  } finally {
    seen.busy = false;
  }
  Object.assign(seen, { checks: null, anyway: "", over: false });
  edit.open = false;
  history.replaceState(null, "", `#${place + 1}`);
  drawRow();
  drawProgress();
  const after = next(place, 1);
  if (after >= 0) fetchRow(after).then((row) => { for (let i = 0; i < Math.min(row.images, 4); i++) new Image().src = `image/${after}/${i}`; }, () => {});
  checkShown(seen.row);
}

async function checkShown(row) {
  if (!row.of) return;
  try {
    const checks = await ask("check", { place: row.place, texts: { question: now("question"), answer: now("answer"), trace: now("trace") } });
    if (seen.row !== row) return;
    seen.checks = checks;
    if (!edit.open) drawChecks(byId("checks"), checks);
  } catch (problem) {
    say(problem.message, "bad");
  }
}

async function walk(step) {
  if (seen.busy || edit.open) return;
  const place = next(seen.row.place, step);
  if (place < 0) return say(step > 0 ? "That was the last row here." : "This is the first row here.");
  say("");
  await show(place);
}

// A decision is on the disk before the page goes on. What the checks are against needs the key twice.
async function decide(what, texts) {
  if (seen.busy || !seen.row?.of || (edit.open && what !== "fix")) return;
  const { place, of, decision } = seen.row, again = JSON.stringify([what, place, texts]);
  if (what === "accept" && decision?.do === "fix" && !seen.over) {
    seen.over = true;
    return say("This row is fixed. Press a again to accept it as it was before.", "bad");
  }
  seen.busy = true;
  try {
    const told = await ask("decide", { place, of, do: what, texts, anyway: seen.anyway === again });
    edit.open = false;
    settled(told);
    ahead.delete(place);
    say(`Row ${place + 1}: ${WORDS[what].toLowerCase()}.`, what);
    await goOn(place);
  } catch (problem) {
    if (problem.problems?.length) {
      seen.anyway = again;
      say(`Not yet: ${problem.message}. ${what === "fix" ? "Save" : "Press a"} again to keep it all the same.`, "bad");
    } else say(problem.message, "bad");
  } finally {
    seen.busy = false;
  }
}

async function goOn(place) {
  const left = (one) => passes(one) && all.status[one] === ".";
  let to = next(place, 1, left);
  if (to < 0) to = next(-1, 1, left);
  if (to < 0) {
    await show(place, true);
    say(all.status.includes(".") ? "All rows here are decided." : "All rows are decided. Press Finish to write the reviewed set.", "good");
  } else await show(to);
}

async function undo() {
  if (seen.busy || edit.open) return;
  seen.busy = true;
  try {
    const told = await ask("undo", { standing: all.standing });
    all.standing = told.standing;
    if (told.place === null) return say(`Taken back: the decision about ${told.id}, which is not shown here.`);
    settled(told);
    await show(told.place, true);
    say(`Row ${told.place + 1}: taken back.`);
  } catch (problem) {
    say(problem.message, "bad");
  } finally {
    seen.busy = false;
  }
}

function settled({ place, status, standing }) {
  all.standing = standing;
  all.status = all.status.slice(0, place) + status + all.status.slice(place + 1);
}

async function filter(name) {
  if (seen.busy || edit.open) return;
  chosen.filter = name;
  await toMatch();
}

async function search(words) {
  chosen.words = words;
  try {
    chosen.found = words.trim() ? new Set((await ask("search", { text: words })).found) : null;
  } catch (problem) {
    return say(problem.message, "bad");
  }
  await toMatch();
}

async function toMatch() {
  const count = [...all.status].filter((_, place) => passes(place)).length;
  say(chosen.found ? `${grouped(count)} row${count === 1 ? "" : "s"} found.` : "");
  drawProgress();
  if (passes(seen.row.place)) return;
  let place = next(seen.row.place, 1);
  if (place < 0) place = next(-1, 1);
  if (place < 0) return say(chosen.found ? "No row has these words." : "No row is of this kind.", "bad");
  await show(place);
}
