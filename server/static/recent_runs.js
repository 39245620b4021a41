// The requests that this browser submitted, newest first: { endpoint, requestId, input, startedAt }.

import { withoutData } from "./labels.js";

const MAX_RUNS = 60;
const MARGIN_MS = 60_000;

export const all = () => JSON.parse(localStorage.getItem("runs") ?? "[]");

function save(runs) {
  for (let count = Math.min(runs.length, MAX_RUNS); count >= 0; count -= 5) {
    try {
      localStorage.setItem("runs", JSON.stringify(runs.slice(0, count), withoutData));
      return;
    } catch {
      // The storage is full: try again with fewer runs.
    }
  }
}

// Whether another program or browser sent a request: it is newer than the oldest one listed here, but not listed.
export function isFromElsewhere({ requestId, startedAt }) {
  const runs = all();
  // A full list may have lost newer ones than its oldest, by the server's clock.
  const margin = runs.length < MAX_RUNS ? 0 : MARGIN_MS;
  return startedAt > runs.at(-1)?.startedAt + margin && !runs.some((run) => run.requestId === requestId);
}

export const add = (run) => save([run, ...all()]);
export const remove = (requestId) => save(all().filter((run) => run.requestId !== requestId));
