// Elements from names, attributes and children. What a row holds only ever becomes a text node or a value.
function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "vars") for (const [one, text] of Object.entries(value)) element.style.setProperty(one, text);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...present(children));
  return element;
}

const present = (children) => children.flat().filter((child) => child !== null && child !== undefined && child !== false);
const replace = (element, ...children) => element.replaceChildren(...present(children));
const grouped = (value) => value.toLocaleString("en");
const byId = (id) => document.getElementById(id);
const key = (text) => make("kbd", {}, text);

function say(text, kind = "") {
  const line = byId("said");
  line.className = kind;
  line.textContent = text;
}
