// The unfinished requests of this page: their place in the queue, the time left, their priority, and cancelling.

import { announce, button, byId, element } from "./elements.js";
import { inWords, loadStepTimes, secondsLeft } from "./estimate.js";

const rows = new Map();

byId("cancel-all").addEventListener("click", () => {
  const runs = [...rows.keys()];
  for (const run of runs) run.cancel();
  announce(`${runs.length} requests cancelled.`);
});

// Show a request that has changed. It leaves the panel when it is done. `changePriority(run, priority)` sends a waiting
// request again with another priority.
export function update(run, changePriority) {
  if (run.isDone) {
    rows.get(run)?.node.remove();
    if (rows.delete(run) && rows.size) loadStepTimes().then(render, () => null);
  } else if (!rows.has(run) && ["IN_QUEUE", "IN_PROGRESS"].includes(run.node.dataset.status)) {
    if (!rows.size) loadStepTimes().then(render, () => null);
    rows.set(run, createRow(run, changePriority));
  }
  render();
}

function createRow(run, changePriority) {
  const state = element("span", { className: "state" });
  const priority = button("", () => changePriority(run, run.request.priority === "low" ? "normal" : "low"));
  const prompt = element("span", { className: "prompt", textContent: run.request.input.prompt || run.request.endpoint });
  const node = element("li", {}, prompt, state, element("span", { className: "actions" }, priority, button("Cancel", () => run.cancel())));
  return { node, state, priority };
}

// Update all rows: a change of one request changes the estimates of the others.
function render() {
  byId("queue").hidden = !rows.size;
  const estimates = secondsLeft([...rows.keys()].map((run) => ({ ...run.progress(), run })));
  let last = 0;
  for (const [{ run }, seconds] of estimates) {
    const { state, priority } = rows.get(run);
    last = seconds ?? last;
    state.textContent = `${run.state.textContent}${seconds === null ? "" : `, ${inWords(seconds)} left`}`;
    const isLow = run.request.priority === "low";
    priority.textContent = isLow ? "Raise priority" : "Lower priority";
    priority.hidden = run.progress().position === null;
  }
  order(estimates.map(([{ run }]) => rows.get(run).node));
  const number = rows.size === 1 ? "1 request" : `${rows.size} requests`;
  byId("queue-title").textContent = `Queue: ${number}${last ? `, ${inWords(last)} left` : ""}`;
}

// Put the rows in this order. A row that is in place is not moved, because it would lose the focus.
function order(nodes) {
  const list = byId("queue-list");
  nodes.forEach((node, place) => {
    if (list.children[place] !== node) list.insertBefore(node, list.children[place] ?? null);
  });
}
