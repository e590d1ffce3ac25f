// A trace cut at its tags, each with the colour of its name, and what stands between a tag and its end tinted.
const HUES = [95, 0, 225, 300, 175, 65];
const KNOWN_HUES = { think: 265, reasoning: 265, back: 28, reflection: 28, answer: 150, conclusion: 150, summary: 195, caption: 330 };
function hue(name) {
  const known = name.toLowerCase();
  if (Object.hasOwn(KNOWN_HUES, known)) return KNOWN_HUES[known];
  let sum = 7;
  for (const letter of known) sum = (31 * sum + letter.codePointAt(0)) >>> 0;
  return HUES[sum % HUES.length];
}

function coloured(text) {
  const found = [], open = [];
  let end = 0;
  const plain = (to) => {
    if (to === end) return;
    const part = text.slice(end, to);
    found.push(open.length ? make("span", { class: "region", vars: { "--hue": hue(open.at(-1)) } }, part) : part);
  };
  for (const match of text.matchAll(/<(\/?)([A-Za-z_][\w-]{0,31})>/g)) {
    plain(match.index);
    if (match[1] && open.at(-1) === match[2]) open.pop();
    found.push(make("span", { class: "tag", vars: { "--hue": hue(match[2]) } }, match[0]));
    if (!match[1]) open.push(match[2]);
    end = match.index + match[0].length;
  }
  plain(text.length);
  return found;
}
