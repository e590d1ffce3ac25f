// The data of the page, and what is chosen of it.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs.map(asRun);
const TWO = RUNS.length > 1;

function asRun(run, place) {
  const { answers } = run;
  const size = answers.text.length;
  const accuracy = answers.parts.accuracy;
  const byPrompt = new Map();
  for (let i = 0; i < size; i++) {
    if (!byPrompt.has(answers.prompt[i])) byPrompt.set(answers.prompt[i], []);
    byPrompt.get(answers.prompt[i]).push(i);
  }
  const searched = new Array(size);
  return {
    ...run,
    place,
    letter: "AB"[place],
    size,
    byPrompt,
    graded: Boolean(accuracy),
    // true, false, or null where no reward says
    right: (i) => (!accuracy || accuracy[i] === null ? null : accuracy[i] >= 0.5),
    prompt: (i) => DATA.prompts[answers.prompt[i]],
    looked: (i) => answers.text[i].includes(run.tag),
    cut: (i) => ["length", "cut"].includes(answers.stops[answers.stop[i]]),
    surprise: (i) => leastLikely(answers.logprobs[i]),
    words(i) {
      searched[i] ??= `${this.prompt(i).slice(0, 3).join("\n")}\n${answers.text[i]}`.toLowerCase();
      return searched[i];
    },
  };
}

// Minus the mean log-prob of an answer's sampled tokens.
function leastLikely(text) {
  let sum = 0, count = 0;
  for (const one of text.split(" ")) if (one && one !== "x") { sum += Number(one); count++; }
  return count ? sum / count / 100 : -1;
}

// The other run's answer to the same question, nearest in step; -1: there is none.
function counterpart(run, i) {
  const other = RUNS[1 - run.place];
  const found = other && other.byPrompt.get(run.answers.prompt[i]);
  if (!found) return -1;
  const far = (j) => Math.abs(other.answers.step[j] - run.answers.step[i]);
  return found.reduce((best, j) => (far(j) < far(best) ? j : best));
}

const chosen = { run: 0, text: "", flags: new Set(), kind: "all", step: "all", sort: "run", answer: -1, colour: "tags" };
const listeners = [];
const changed = (what) => listeners.forEach((listener) => listener(what));

const FLAGS = [
  { name: "wrong", label: () => "Wrong", title: "Answers whose accuracy is 0", there: () => RUNS.some((run) => run.graded), keeps: (run, i) => run.right(i) === false },
  { name: "blind", label: () => `No ${RUNS[chosen.run].tag}`, title: "Answers that never wrote the tag", there: () => true, keeps: (run, i) => !run.looked(i) },
  { name: "cut", label: () => "Cut off", title: "Ended by the token budget", there: () => true, keeps: (run, i) => run.cut(i) },
  { name: "apart", label: () => "Runs disagree", title: "Right in one run, wrong in the other", there: () => TWO, keeps: disagree },
  { name: "heat", label: () => "With attention", title: "Attention over the image was computed", there: () => RUNS.some((run) => Object.keys(run.heats).length), keeps: (run, i) => i in run.heats },
];

function disagree(run, i) {
  const j = counterpart(run, i);
  return j >= 0 && run.right(i) !== null && run.right(i) !== RUNS[1 - run.place].right(j);
}

const SORTS = {
  run: ["Order of the run", null],
  longest: ["Longest", (run, i) => -run.answers.length[i]],
  shortest: ["Shortest", (run, i) => run.answers.length[i]],
  worst: ["Lowest reward", (run, i) => run.answers.reward[i] ?? Infinity],
  best: ["Highest reward", (run, i) => -(run.answers.reward[i] ?? -Infinity)],
  unsure: ["Least likely tokens", (run, i) => -run.surprise(i)],
};

function shownAnswers() {
  const run = RUNS[chosen.run];
  const words = chosen.text.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const flags = FLAGS.filter((flag) => chosen.flags.has(flag.name));
  const kept = [];
  for (let i = 0; i < run.size; i++) {
    if (chosen.step !== "all" && run.answers.step[i] !== Number(chosen.step)) continue;
    if (chosen.kind !== "all" && Boolean(run.answers.heldOut[i]) !== (chosen.kind === "held")) continue;
    if (flags.some((flag) => !flag.keeps(run, i))) continue;
    if (words.length && !words.every((word) => run.words(i).includes(word))) continue;
    kept.push(i);
  }
  const key = SORTS[chosen.sort][1];
  if (!key) return kept;
  const keys = new Map(kept.map((i) => [i, key(run, i)]));
  return kept.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
}
