// What this browser ran, the newest first: { endpoint, requestId, input, startedAt }.

const MOST = 60;

export const all = () => JSON.parse(localStorage.getItem("runs") ?? "[]");

// Pictures that were pasted as data are too large to be kept, and the browser's room ends somewhere.
const light = (value) => (typeof value === "string" && value.startsWith("data:") ? undefined : value);

function keep(runs) {
  for (let number = Math.min(runs.length, MOST); number >= 0; number -= 5) {
    try {
      localStorage.setItem("runs", JSON.stringify(runs.slice(0, number), (_, value) => light(value)));
      return;
    } catch {
      // Full: with fewer of them it may fit.
    }
  }
}

export const add = (run) => keep([run, ...all()]);
export const remove = (requestId) => keep(all().filter((run) => run.requestId !== requestId));
