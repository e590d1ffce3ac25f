// The page, from top to bottom.
function header() {
  const title = RUNS.map((run) => make("span", { class: `run-${run.letter}` }, TWO && make("i", { class: "dot" }), run.name));
  const facts = RUNS.map((run) => {
    const told = [run.finished ? "finished" : "not finished", run.steps && `${grouped(run.steps)} steps`, `${grouped(run.size)} answers`, ...run.facts.filter(([key]) => key === "commit").map(([key, value]) => `${key} ${value}`)];
    return make("div", { class: "faint" }, (TWO ? `${run.letter}: ` : "") + told.filter(Boolean).join(" · "));
  });
  const links = [["result", "Result"], ["curves", "Curves"], ["answers", "Answers"], ["settings", "Settings"]].map(([id, label]) => make("a", { href: `#${id}` }, label));
  return make("header", null,
    make("div", null, make("h1", null, ...title.flatMap((one, i) => (i ? [" against ", one] : [one]))), ...facts),
    make("nav", { "aria-label": "Sections" }, ...links, themeButton()));
}

function themeButton() {
  const themes = ["auto", "light", "dark"];
  let at = 0;
  const button = make("button", { type: "button", class: "plain", "aria-label": "Colours of the page", onclick: () => { at = (at + 1) % themes.length; apply(); } });
  const apply = () => {
    button.textContent = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" }[themes[at]];
    if (at) document.documentElement.dataset.theme = themes[at]; else delete document.documentElement.dataset.theme;
  };
  apply();
  return button;
}

document.getElementById("page").append(header(), make("main", null, resultSection(), curvesSection(), answersSection(), settingsSection()), tip);
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || /^(input|select|textarea)$/i.test(event.target.tagName)) return;
  event.preventDefault();
  document.getElementById("search").focus();
});
window.addEventListener("scroll", placeTip, { passive: true, capture: true });
changed("filter");
document.documentElement.dataset.ready = "1";
