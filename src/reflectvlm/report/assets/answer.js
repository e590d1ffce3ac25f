// The chosen answer: question and pictures once, and the answer of each run with its rewards and tokens.
const pane = make("div", { class: "pane", id: "pane", "aria-live": "off" });
const tip = make("div", { class: "tip", id: "tip", role: "status", "aria-live": "polite", hidden: true });

function showAnswer() {
  hideTip();
  const run = RUNS[chosen.run], i = chosen.answer;
  if (i < 0) { replace(pane, make("p", { class: "faint empty" }, run.size ? "Choose an answer on the left." : "No answers are recorded yet.")); return; }
  const [sample, question, gold, images] = run.prompt(i);
  const head = make("div", { class: "question" },
    make("div", { class: "faint" }, `sample ${sample} · ${run.answers.heldOut[i] ? "held out" : "training"}`),
    make("div", { class: "asked" }, question),
    gold && make("div", null, make("span", { class: "chip gold" }, "answer ", make("b", null, gold))));
  const shown = [[run, i]];
  if (TWO) shown.push([RUNS[1 - run.place], counterpart(run, i)]);
  const columns = shown.sort((a, b) => a[0].place - b[0].place).map(([one, j]) => (j < 0 ? nothing(one) : answerCard(one, j, images)));
  replace(pane, head, others(run, i), make("div", { class: `columns of-${columns.length}` }, ...columns));
  pane.scrollTop = 0;
}

function nothing(run) {
  return make("article", { class: `card answer run-${run.letter}` }, make("h4", null, run.name), make("p", { class: "faint" }, "No answer to this question is recorded in this run."));
}

// The run's other answers to the question, by step.
function others(run, i) {
  const same = run.byPrompt.get(run.answers.prompt[i]);
  if (same.length < 2) return null;
  const most = 24;
  const at = same.indexOf(i), from = Math.max(0, Math.min(at - most / 2, same.length - most));
  const chips = same.slice(from, from + most).map((j) => make("button", { type: "button", class: `chip ${verdict(run, j).class}`, "aria-current": j === i ? "true" : null, onclick: () => { chosen.answer = j; changed("answer"); } }, `step ${run.answers.step[j]} ${verdict(run, j).mark}`));
  return make("div", { class: "others", "aria-label": "Answers of this run to the same question" }, make("span", { class: "faint" }, "same question:"), ...chips, same.length > most && make("span", { class: "faint" }, `and ${same.length - most} more`));
}

function verdict(run, i) {
  const right = run.right(i);
  if (!run.answers.scored[i]) return { class: "unknown", mark: "?", text: "not scored" };
  if (right === null) return { class: "unknown", mark: number(run.answers.reward[i]), text: "" };
  return right ? { class: "good", mark: "✓", text: "right" } : { class: "bad", mark: "✗", text: "wrong" };
}

function answerCard(run, i, images) {
  const { answers } = run;
  const tokens = tokensOf(run, i);
  const heat = heatOf(run, i);
  const shown = images.map((image, place) => picture(image, `image ${place}`)).map((one, place) => one && { ...one, place }).filter(Boolean);
  const chip = (block) => blockChip(run, i, block, images);
  const body = answerBody(run, i, tokens, chip);
  const answer = make("div", { class: "body", tabindex: 0, role: "group", "aria-label": `Answer of ${run.name}, ${tokens.length} tokens; left and right arrow keys go through them` }, body);
  const state = { run, i, tokens, heat, pictures: shown, answer, at: -1 };
  if (tokens.length) follow(state);
  colour(state);
  const said = verdict(run, i);
  return make("article", { class: `card answer run-${run.letter}${heat ? " hot" : ""}` },
    make("div", { class: "bar" },
      TWO && make("h4", null, make("i", { class: "dot" }), `${run.letter} · ${run.name}`),
      said.text && make("span", { class: `badge ${said.class}` }, said.text),
      make("span", { class: "faint" }, `step ${answers.step[i]} · ${answers.length[i]} tokens · stop: ${answers.stops[answers.stop[i]] || "?"}`)),
    make("div", { class: "top" }, shown.length ? make("div", { class: "pictures" }, ...shown.map((one) => one.node)) : images.length ? make("p", { class: "faint" }, "Its picture is not kept.") : null,
      make("div", { class: "side" }, rewards(run, i),
        heat && make("p", { class: "faint hint" }, "Move over a token, or focus the text and use the arrow keys: where it looked is drawn over the image."))),
    answer,
    tokens.length ? null : make("p", { class: "faint" }, "Tokens are not recorded for this answer."));
}

function rewards(run, i) {
  const { answers } = run;
  const most = (values) => (values.most ??= values.reduce((top, one) => Math.max(top, Math.abs(one ?? 0)), 1));
  const row = (name, value, values, strong) => make("div", { class: strong ? "part strong" : "part" }, make("span", null, name),
    make("span", { class: "track", "aria-hidden": "true" }, make("i", { class: value < 0 ? "minus" : null, vars: { width: `${(100 * Math.abs(value ?? 0)) / most(values)}%` } })), make("span", { class: "num" }, number(value)));
  const parts = Object.entries(answers.parts).filter(([, values]) => values[i] !== null);
  return make("div", { class: "parts", role: "group", "aria-label": "Rewards" }, row("reward", answers.scored[i] ? answers.reward[i] : null, answers.reward, true), ...parts.map(([name, values]) => row(name, values[i], values)));
}

function blockChip(run, i, [after, place, keep], images) {
  const grid = run.answers.blocks[i].grids[place] ?? [1, 1, 1];
  const count = grid[0] * grid[1] * grid[2];
  const label = `image ${place}: ${keep === null ? `all ${count}` : `${keep.length} of ${count}`} tokens`;
  return make("span", { class: "block", title: `shown again after ${after} tokens` }, cellsPicture(images[place], grid, keep, keep === null ? 44 : 72), make("span", null, label));
}

function heatOf(run, i) {
  const heat = run.heats[i];
  if (!heat) return null;
  const bytes = Uint8Array.from(atob(heat.levels), (letter) => letter.charCodeAt(0));
  const cells = heat.rows * heat.columns;
  return { ...heat, of: (token) => bytes.subarray(token * cells, (token + 1) * cells) };
}

// -- following one token ------------------------------------------------------------------------------

function follow(state) {
  const { answer } = state;
  // A pointer that rests while the page moves under it must not take over from the keyboard.
  let last = null;
  answer.addEventListener("pointermove", (event) => {
    const node = event.target.closest("[data-token]");
    if (node === last && state.at >= 0) return;
    last = node;
    if (node) select(state, Number(node.dataset.token), node); else leave(state);
  });
  answer.addEventListener("pointerleave", () => { if (last) leave(state); last = null; });
  answer.addEventListener("blur", () => leave(state));
  answer.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: state.at - 1, ArrowRight: state.at + 1, Home: 0, End: state.tokens.length - 1 };
    if (event.key === "Escape") leave(state);
    else if (event.key in moves) select(state, Math.max(0, Math.min(state.tokens.length - 1, moves[event.key])));
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
}

function select(state, token, near = null) {
  leave(state);
  state.at = token;
  const nodes = [...state.answer.querySelectorAll(`[data-token="${token}"]`)];
  nodes.forEach((node) => node.classList.add("on"));
  drawHeat(state, token);
  if (nodes.length) showTip(state, token, near ?? nodes[0]);
}

function leave(state) {
  state.answer.querySelectorAll(".on").forEach((node) => node.classList.remove("on"));
  if (state.at >= 0) state.pictures.forEach((one) => one.clear());
  state.at = -1;
  hideTip();
}

function drawHeat({ heat, pictures, tokens, at, run, i }, token) {
  const first = tokens[token].first;
  const target = heat && first < heat.peaks.length && pictures.find((one) => one.place === heat.image);
  if (!target) return;
  target.heat(heat.rows, heat.columns, heat.of(first), `strongest cell: ${percent(heat.peaks[first])} of this token's attention; whole image: ${percent(heat.shares[first])}`);
  target.node.querySelector("canvas").dataset.token = String(at);
}

function showTip({ run, i, tokens, heat }, token, near) {
  const { start, end, surprise, first } = tokens[token];
  const line = (name, value) => make("div", null, make("span", { class: "faint" }, name), " ", make("b", null, value));
  const known = surprise.filter((one) => one !== null);
  const minus = known.reduce((sum, one) => sum + one, 0);
  const parts = Object.entries(run.answers.parts).filter(([, values]) => values[i] !== null);
  replace(tip,
    make("code", { class: "token" }, visible(run.answers.text[i].slice(start, end))),
    surprise.length > 1 && make("span", { class: "faint" }, ` ${surprise.length} tokens`),
    known.length ? make("div", { class: "chance" }, line("probability", percent(Math.exp(-minus))), make("span", { class: "track" }, make("i", { vars: { width: `${100 * Math.exp(-minus)}%` } })), line("log-prob", number(-minus))) : make("div", { class: "faint" }, "forced, not sampled"),
    heat && first < heat.shares.length && line("attention on the image", percent(heat.shares[first])),
    make("div", { class: "of" }, line("reward of the answer", number(run.answers.reward[i])), ...parts.map(([name, values]) => line(name, number(values[i])))));
  tip.hidden = false;
  anchor = near;
  placeTip();
}

// Stays at its token while the page scrolls, as it does when the keyboard reaches an answer.
let anchor = null;
function placeTip() {
  if (tip.hidden) return;
  const box = anchor.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = box.bottom + 8 + own.height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 8))}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - own.height - 8)}px`;
}

function hideTip() { tip.hidden = true; }

// -- colours of tokens --------------------------------------------------------------------------------

const COLOURS = { tags: "Tags", surprise: "Surprise", look: "Attention" };

function colour({ answer, tokens, heat }) {
  answer.dataset.colour = chosen.colour;
  if (chosen.colour === "tags") return;
  const most = heat ? Math.max(...heat.shares, 1e-9) : 1;
  for (const node of answer.querySelectorAll("[data-token]")) {
    const { surprise, first } = tokens[Number(node.dataset.token)];
    const unlikely = Math.min(1, surprise.reduce((sum, one) => sum + (one ?? 0), 0) / 3);
    const value = chosen.colour === "surprise" ? unlikely : heat ? (heat.shares[first] ?? 0) / most : 0;
    node.style.setProperty("--level", value.toFixed(3));
  }
}
