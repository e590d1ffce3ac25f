// Elements from names, attributes and children. What a model wrote only ever becomes a text node.
const SVG = document.getElementById("seed").namespaceURI;

function make(name, attributes, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function draw(name, attributes, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "vars") for (const [name, one] of Object.entries(value)) element.style.setProperty(name, one);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function replace(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined && child !== false));
}

const MINUS = "\u2212";

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
  return text.replace("-", MINUS);
}

const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(Math.abs(value) < 0.0995 && value !== 0 ? 1 : 0)} %`);
const grouped = (value) => value.toLocaleString("en");

// The same hue for a tag's name wherever it stands.
const HUES = [95, 0, 225, 300, 175, 65];
const KNOWN_HUES = { think: 265, reasoning: 265, back: 28, reflection: 28, answer: 150, conclusion: 150, summary: 195, caption: 330 };
function hue(name) {
  if (Object.hasOwn(KNOWN_HUES, name.toLowerCase())) return KNOWN_HUES[name.toLowerCase()];
  let sum = 7;
  for (const letter of name.toLowerCase()) sum = (31 * sum + letter.codePointAt(0)) >>> 0;
  return HUES[sum % HUES.length];
}
