// An answer's text cut into tags, tokens and inserted blocks.
const TAG = /<(\/?)([A-Za-z_][\w-]{0,31})>/g;

// [{start, end, tag, region}]: a tag by its name, or text with the tag that it stands in.
function pieces(text) {
  const found = [], open = [];
  let end = 0;
  const plain = (to) => { if (to > end) found.push({ start: end, end: to, tag: null, region: open.at(-1) ?? null }); };
  for (const match of text.matchAll(TAG)) {
    plain(match.index);
    end = match.index + match[0].length;
    const at = match[1] ? open.lastIndexOf(match[2]) : -1;
    if (!match[1]) open.push(match[2]);
    else if (at >= 0) open.length = at;
    found.push({ start: match.index, end, tag: match[2], region: null });
  }
  plain(text.length);
  return found;
}

// [{start, end, first, surprise: [...]}]; tokens that share a character are one. `surprise` is minus a
// log-prob, null where the token was forced.
function tokensOf(run, i) {
  const { starts, logprobs, text } = run.answers;
  if (!starts[i]) return [];
  let place = 0;
  const begins = starts[i].split(" ").map((one) => (place += Number(one)));
  const surprise = logprobs[i].split(" ").map((one) => (one === "x" ? null : Number(one) / 100));
  const found = [];
  let waiting = [], first = 0;
  for (let t = 0; t < surprise.length; t++) {
    const start = begins[t] ?? text[i].length;
    const end = begins[t + 1] ?? text[i].length;
    if (!waiting.length) first = t;
    waiting.push(surprise[t]);
    const last = t === surprise.length - 1;
    if (end > start || last) { found.push({ start, end, first, surprise: waiting }); waiting = []; }
  }
  found.begins = begins;
  return found;
}

// The answer as an element, tokens with `data-token`; `chip(block)` makes what stands for an inserted block.
function answerBody(run, i, tokens, chip) {
  const text = run.answers.text[i];
  const blocks = (run.answers.blocks[i]?.list ?? []).map((block) => ({ block, at: tokens.begins ? tokens.begins[block[0]] ?? text.length : text.length }));
  const parts = pieces(text);
  const cuts = [...new Set([...parts.map((one) => one.start), ...tokens.map((one) => one.start), ...blocks.map((one) => one.at), text.length])].sort((a, b) => a - b);
  const body = make("div", { class: "text" });
  let part = -1, token = 0, node = body;
  for (let c = 0; c < cuts.length; c++) {
    const [start, end] = [cuts[c], cuts[c + 1] ?? text.length];
    const between = parts[part + 1]?.start === start || start === text.length;
    for (const one of blocks) if (one.at === start) (between ? body : node).append(chip(one.block));
    if (parts[part + 1]?.start === start) { part++; node = pieceNode(parts[part]); body.append(node); }
    while (token < tokens.length - 1 && tokens[token].end <= start) token++;
    if (end > start) node.append(tokens.length ? tokenNode(text.slice(start, end), token) : text.slice(start, end));
  }
  const last = tokens.at(-1);
  if (last && last.start === last.end && last.start === text.length) body.append(make("span", { class: "t stop", "data-token": tokens.length - 1 }, "■"));
  return body;
}

function pieceNode(piece) {
  if (piece.tag) return make("span", { class: "tag", vars: { "--hue": hue(piece.tag) } });
  return make("span", piece.region ? { class: "region", vars: { "--hue": hue(piece.region) } } : null);
}

const tokenNode = (text, token) => make("span", { class: "t", "data-token": token }, text);
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "end of answer";
