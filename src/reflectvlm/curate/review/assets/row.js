// The row on the screen: question, images, answer, votes, trace, and what the checks say.
const WORDS = { accept: "Accepted", fix: "Fixed", drop: "Dropped" };
const LAYOUT_WORDS = { look_back: "Look-Back", qwen_la: "Qwen-LA", grpo: "think and box", none: "no layout" };

// A row as it stands: the texts of a fix instead of its own.
const now = (part) => seen.row.decision?.fields[part] ?? seen.row[part];

function drawRow() {
  const row = seen.row;
  ready();
  replace(byId("where"),
    make("h1", {}, `Row ${grouped(row.place + 1)}`, make("span", { class: "faint" }, ` of ${grouped(all.status.length)}`)),
    make("span", { class: "id faint", title: row.position }, row.id === row.position ? row.id : `${row.id} · ${row.position}`),
    row.decision && badge(row.decision),
    row.mixed && make("span", { class: "badge warn" }, "judges disagree"),
    row.why && row.why !== "judges differ" && make("span", { class: "badge warn" }, row.why),
    row.draft && make("span", { class: "badge warn" }, "unsaved edit: press f"));
  replace(byId("pictures"), ...pictures(row));
  byId("pictures").hidden = !row.images;
  byId("row").classList.toggle("bare", !row.images);
  replace(byId("card"),
    part("Question", make("p", { class: "asked" }, now("question")), now("question") !== row.question && was(row.question)),
    row.has_answer && part("Gold answer", make("p", { class: "gold" }, now("answer") || "none"), now("answer") !== row.answer && was(row.answer)),
    votes(row.votes),
    make("section", {},
      make("div", { class: "head" }, make("h2", {}, "Trace"), make("span", { id: "checks", class: "checks", role: "group", "aria-label": "Checks" })),
      make("div", { class: "trace" }, now("trace") ? coloured(now("trace")) : make("i", { class: "faint" }, "There is no trace."))),
    votes(row.first_votes, "Judges of the first answer, which this trace replaces"),
    row.first_answer && part("First answer, replaced", make("div", { class: "trace faint" }, row.first_answer)),
    row.others.length > 0 && others(row.others));
  drawChecks(byId("checks"), seen.checks);
}

const part = (name, ...children) => make("section", {}, make("h2", {}, name), ...children);
const was = (text) => make("p", { class: "was faint" }, "was: ", make("s", {}, text || "nothing"));

function badge(decision) {
  const when = new Date(decision.at).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
  return make("span", { class: `badge ${decision.do}`, title: decision.despite ? `although ${decision.despite}` : "" },
    `${WORDS[decision.do]} by ${decision.by}, ${when}${decision.despite ? ", despite the checks" : ""}`);
}

function pictures(row) {
  return Array.from({ length: row.images }, (_, number) => {
    const picture = make("img", { src: `image/${row.place}/${number}`, alt: `Image ${number + 1} of ${row.images}` });
    const frame = make("button", { class: "picture", title: "Enlarge (z)", onclick: () => openZoom(row.place, number) }, picture);
    picture.addEventListener("load", () => {
      picture.style.setProperty("--ratio", picture.naturalWidth / picture.naturalHeight);
      picture.classList.toggle("pixels", picture.naturalWidth < 160);
    });
    picture.addEventListener("error", () => brokenImage(frame, row.place, number));
    return frame;
  });
}

async function brokenImage(frame, place, number) {
  let why = "The image cannot be shown.";
  try { await ask(`image/${place}/${number}`); } catch (problem) { why = problem.message; }
  frame.replaceWith(make("p", { class: "broken", role: "img", "aria-label": why }, why));
}

function votes(list, name = "Judges") {
  if (!list.length) return null;
  return part(name, make("ul", { class: "votes" }, ...list.map((vote) =>
    make("li", {}, make("span", { class: `badge ${vote.verdict === "right" ? "accept" : vote.verdict === "wrong" ? "drop" : ""}` }, vote.verdict),
      make("b", {}, vote.judge), vote.why && make("span", { class: "faint" }, vote.why)))));
}

function others(list) {
  return make("details", {}, make("summary", {}, `${list.length} other column${list.length > 1 ? "s" : ""}`),
    make("table", {}, make("tbody", {}, ...list.map(([name, text]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, text))))));
}

function drawChecks(element, checks) {
  if (!checks) return replace(element, make("span", { class: "faint" }, "checking …"));
  const mark = (good, text, more = "") => make("span", { class: `check ${good === true ? "good" : good === false ? "bad" : "faint"}`, title: more },
    make("span", { "aria-hidden": "true" }, good === true ? "✓ " : good === false ? "✗ " : "– "), text);
  replace(element,
    mark(!checks.problem, checks.problem ? `Layout ${LAYOUT_WORDS[checks.layout]}: ${checks.problem}` : `Layout ${LAYOUT_WORDS[checks.layout]}`),
    seen.row.has_answer && mark(checks.right, checks.why || (checks.right === true ? `Answer ${checks.answer} is right`
      : checks.right === false ? `Answer ${checks.answer} is not the gold answer` : "No answer to compare")),
    checks.row && mark(false, checks.row));
}
