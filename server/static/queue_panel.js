// The unfinished requests of this page: their place in the queue, the time left, their priority, and cancelling.

import { announce, button, byId, element } from "./elements.js";
import { inWords, loadStepTimes, secondsLeft } from "./estimate.js";

const rows = new Map();

const inNumber = (number) => (number === 1 ? "1 request" : `${number} requests`);

byId("cancel-all").addEventListener("click", async () => {
  const cancelled = await Promise.all([...rows.keys()].map((run) => run.cancel()));
  announce(`${inNumber(cancelled.filter(Boolean).length)} cancelled.`);
});

byId("toggle-queue").addEventListener("click", () => {
  const list = byId("queue-list");
  list.hidden = !list.hidden;
  byId("toggle-queue").setAttribute("aria-expanded", String(!list.hidden));
  byId("toggle-queue").textContent = list.hidden ? "Show" : "Hide";
});

// While the pointer is over the panel, no row moves under it: a row that leaves keeps its place.
byId("queue").addEventListener("pointerleave", () => {
  for (const node of byId("queue-list").querySelectorAll(".gone")) node.remove();
});

// Show a request that has changed. It leaves the panel when it is done. `changePriority(run, priority)` sends a
// request that has not begun again, with another priority.
export function update(run, changePriority) {
  // Before its result is there, a completed request is not done.
  if (run.isDone || run.node.dataset.status === "COMPLETED") {
    removeRow(run);
    if (rows.delete(run) && rows.size) loadStepTimes().then(render, () => null);
  } else if (!rows.has(run) && ["IN_QUEUE", "IN_PROGRESS"].includes(run.node.dataset.status)) {
    if (!rows.size) loadStepTimes().then(render, () => null);
    rows.set(run, createRow(run, changePriority));
  }
  render();
}

// Move the focus to the next row, if it was in this one.
function removeRow(run) {
  const node = rows.get(run)?.node;
  const others = [...rows.values()].map((row) => row.node).filter((other) => other !== node);
  const isAfter = (other) => node.compareDocumentPosition(other) & Node.DOCUMENT_POSITION_FOLLOWING;
  const next = node?.contains(document.activeElement) && (others.find(isAfter) ?? others.at(-1));
  // Without a scroll: the panel is in the window already.
  if (next) next.querySelector("button:not([hidden])").focus({ preventScroll: true });
  else if (rows.has(run) && rows.size === 1 && byId("queue").contains(document.activeElement)) {
    byId("tab-images").focus({ preventScroll: true });
  }
  // A touch leaves its hover behind.
  if (matchMedia("(hover: hover)").matches && byId("queue").matches(":hover")) node?.classList.add("gone");
  else node?.remove();
}

function createRow(run, changePriority) {
  const state = element("span", { className: "state" });
  const priority = button("", async () => {
    priority.disabled = true;
    await changePriority(run, run.request.priority === "low" ? "normal" : "low");
    priority.disabled = false;
  });
  const { prompt: text, seed } = run.request.input;
  const ofSeed = seed === undefined ? "" : `, seed ${seed}`;
  const prompt = element("span", { className: "prompt", textContent: `${text || run.request.endpoint}${ofSeed}` });
  const node = element("li", {}, prompt, state, element("span", { className: "actions" }, priority, button("Cancel", () => run.cancel())));
  return { node, state, priority };
}

// Update all rows: a change of one request changes the estimates of the others.
function render() {
  byId("queue").hidden = !rows.size;
  if (!rows.size) byId("queue-list").replaceChildren();
  const estimates = secondsLeft([...rows.keys()].map((run) => ({ ...run.progress(), run })));
  let last = 0;
  for (const [{ run }, seconds] of estimates) {
    const { state, priority } = rows.get(run);
    last = seconds ?? last;
    state.textContent = `${run.state.textContent}${seconds === null ? "" : `, ${inWords(seconds)} left`}`;
    const isLow = run.request.priority === "low";
    priority.textContent = isLow ? "Raise priority" : "Lower priority";
    priority.hidden = run.progress().step > 0;
  }
  order(estimates.map(([{ run }]) => rows.get(run).node));
  byId("queue-title").textContent = `Queue: ${inNumber(rows.size)}${last ? `, ${inWords(last)} left` : ""}`;
}

// Put the rows in this order. A row that is moved would lose the focus.
function order(nodes) {
  const [list, focused] = [byId("queue-list"), document.activeElement];
  const shown = [...list.children].filter((node) => !node.classList.contains("gone"));
  if (nodes.some((node, place) => node !== shown[place])) list.replaceChildren(...nodes);
  if (list.contains(focused) && focused !== document.activeElement) focused.focus({ preventScroll: true });
}
