// Requests to the server that wrote this page. Decisions go out one after the other.
class Problem extends Error {
  constructor(status, told) {
    super(told.error);
    this.status = status;
    this.problems = told.problems || [];
  }
}

async function ask(path, body, more = {}) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), ...more };
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", credentials: "omit", ...options });
  } catch {
    throw new Problem(0, { error: "The review has ended. Start it again; all decisions so far are saved." });
  }
  const told = await answer.json();
  if (!answer.ok) throw new Problem(answer.status, told);
  return told;
}

// The row after this one is fetched while somebody reads.
const ahead = new Map();
function fetchRow(place) {
  if (!ahead.has(place)) {
    const asked = ask(`row/${place}`);
    asked.catch(() => ahead.delete(place));
    ahead.set(place, asked);
    if (ahead.size > 6) ahead.delete(ahead.keys().next().value);
  }
  return ahead.get(place);
}
