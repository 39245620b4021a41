// The grid of results: this browser's requests, its favourites, and the earlier requests of the key.

import * as api from "./api.js";
import { withKey } from "./api_key.js";
import { announce, byId, confirm, element } from "./elements.js";
import * as favourites from "./favourites.js";
import { showFavourite } from "./figure.js";
import * as recentRuns from "./recent_runs.js";
import { Run } from "./run.js";
import { imageToImageFor } from "./targets.js";

const list = byId("runs");
const runs = new Map();
let page;
let chosen = null;
let onlyFavourites = false;
let cursor = null;
let isSearching = false;
// How many pages of earlier requests a search looks at.
const SEARCHED_PAGES = 5;

// `thePage` is { config, useSettings(endpoint, input), showCodeOf(endpoint, input), useAsInput(url, endpoint, path, prompt),
// submit(endpoint, input), schemaOf(endpoint), onSeed(seed), repaint(url, request) }.
export function start(thePage) {
  page = thePage;
  if (!page.config.image_to_image.length) actions.useAsInput = null;
  for (const request of recentRuns.all()) follow(add(request, { isOld: true }));
  byId("earlier").addEventListener("click", () => showEarlier().catch((error) => (byId("problem").textContent = error.message)));
  byId("only-favourites").addEventListener("click", showOnlyFavourites);
  byId("search").addEventListener("input", () => search().catch((error) => (byId("problem").textContent = error.message)));
  list.addEventListener("keydown", moveFocus);
}

// The images shown in the grid, in its order.
export const shown = () => [...list.children]
  .filter((node) => !node.hidden && runs.has(node.dataset.requestId))
  .flatMap((node) => runs.get(node.dataset.requestId).results)
  .filter((result) => !result.node.hidden);

// Show a request. An old one comes after the others, and its seed is not that of the last image.
export function add(request, { isOld = false } = {}) {
  const run = new Run(request, { ...actions, onFinish: () => onFinish(run, isOld) });
  runs.set(request.requestId, run);
  list[isOld ? "append" : "prepend"](run.node);
  filter();
  return run;
}

export const follow = (run) => withKey(() => run.follow()).catch((error) => run.fail(error));

// Use a module that the page loads only when it is needed, and show what fails.
async function withModule(loading, use) {
  try {
    const module = await loading.catch(() => Promise.reject(new Error("The server cannot be reached. Try again when it runs.")));
    await use(module);
  } catch (error) {
    byId("problem").textContent = error.message;
  }
}

const vary = (run, index) => withModule(import("./variations.js"), ({ seedOf, withNeighbouringSeeds }) =>
  submitAll(run, withNeighbouringSeeds(run.settings(), seedOf(run.seed, index))));

const varyStrength = (run, index) => withModule(import("./variations.js"), async ({ seedOf, withNeighbouringStrengths }) => {
  const { strength } = await page.schemaOf(run.request.endpoint);
  await submitAll(run, withNeighbouringStrengths(run.settings(), seedOf(run.seed, index), strength));
});

export const actions = {
  // While an image is chosen to compare, a click on another image compares the two.
  open: (result) => chosen && chosen !== result ? compare(result) : withModule(import("./lightbox.js"), ({ open }) => open(result, { shown, page, actions })),
  compare,
  toggleFavourite,
  useAsInput: (result) => page.useAsInput(result.url, imageToImageFor(page.config, result.run.request.endpoint), "image_url", result.run.request.input.prompt),
  useSettings: async (run) => {
    await page.useSettings(run.request.endpoint, run.settings());
    announce("The form has these settings, with the seed.");
  },
  vary,
  varyStrength,
  confirmDelete: ({ results }) => {
    const images = results.length === 1 ? "its image" : `its ${results.length} images`;
    return confirm("Delete this request?", `The server deletes the request and ${images}. This cannot be undone.`, "Delete");
  },
  // Without the server there is no panel; the request itself shows that the server cannot be reached.
  onUpdate: (run) => import("./queue_panel.js").then(({ update }) => update(run, changePriority), () => null),
  onDelete: remove,
  onMissing: (result) => chosen === result && chooseForComparison(null),
  onError: (error) => (byId("problem").textContent = error.message),
};

// fal's API cannot change the priority of a waiting request, so it is sent again and then cancelled.
async function changePriority(run, priority) {
  const { endpoint, input } = run.request;
  try {
    await page.submit(endpoint, input, priority);
    await run.delete();
    announce(priority === "low" ? "It waits for all requests of normal priority." : "It waits with the requests of normal priority.");
  } catch (error) {
    byId("problem").textContent = error.message;
  }
}

function onFinish(run, isOld) {
  if (!isOld) page.onSeed(run.seed);
  filter();
}

async function submitAll(run, inputs) {
  try {
    for (const input of inputs) await page.submit(run.request.endpoint, input);
    announce(`${inputs.length} variations sent. They appear first in the grid.`);
  } catch (error) {
    announce(error.message);
    byId("problem").textContent = error.message;
  }
}

function remove(run) {
  announce("Deleted.");
  const next = run.node.contains(document.activeElement) ? (run.node.nextElementSibling ?? run.node.previousElementSibling) : null;
  if (chosen?.run === run) chooseForComparison(null);
  run.node.remove();
  runs.delete(run.request.requestId);
  recentRuns.remove(run.request.requestId);
  favourites.remove(run.request.requestId);
  filter();
  next?.querySelector("a, button")?.focus();
}

function toggleFavourite(result) {
  try {
    const isMarked = favourites.toggle(result.run.request, result.index);
    showFavourite(result);
    announce(isMarked ? "Added to the favourites." : "Removed from the favourites.");
    filter();
    return isMarked;
  } catch {
    byId("problem").textContent = "The browser's storage is full. Remove favourites or old settings first.";
    return false;
  }
}

// The first call chooses an image. A call with another image compares the two; one with the same image cancels the choice.
async function compare(result) {
  if (chosen === result) {
    cancelComparison();
    return;
  }
  if (!chosen) {
    chooseForComparison(result);
    announce("Image chosen. Choose a second image to compare, or press Escape.", false);
    return;
  }
  const other = chosen;
  chooseForComparison(null);
  await withModule(import("./compare.js"), ({ open }) => open(other, result));
}

function chooseForComparison(result) {
  chosen?.compareButton.setAttribute("aria-pressed", "false");
  chosen = result;
  chosen?.compareButton.setAttribute("aria-pressed", "true");
  byId("comparing").hidden = !chosen;
}

function cancelComparison() {
  const { node } = chosen;
  chooseForComparison(null);
  announce("Comparison cancelled.");
  node.querySelector("a.open")?.focus();
}

byId("stop-comparing").addEventListener("click", cancelComparison);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chosen && !document.querySelector("dialog[open]")) cancelComparison();
});

// Load this key's other requests from the server, page by page, including those of other browsers and programs.
async function showEarlier() {
  const { items, next_cursor: next, has_more: hasMore } = await withKey(() => api.listRequests(cursor));
  for (const item of items.filter(({ request_id: id }) => !runs.has(id))) {
    const { request_id: requestId, endpoint_id: endpoint, json_input: input, sent_at: sentAt } = item;
    const run = add({ endpoint, requestId, input: input ?? {}, startedAt: Date.parse(sentAt) }, { isOld: true });
    if (item.status_code === 200 && item.json_output) run.finish(item.json_output);
    else follow(run);
  }
  cursor = next;
  byId("earlier").hidden = !hasMore;
  filter();
}

// Show what fits the words. If nothing does, look at the server's next requests too, but not at all of them.
async function search() {
  filter();
  if (isSearching) return;
  isSearching = true;
  try {
    for (let number = 0; number < SEARCHED_PAGES; number += 1) {
      if (!byId("search").value || byId("empty").hidden || byId("earlier").hidden) return;
      await showEarlier();
    }
  } finally {
    isSearching = false;
  }
}

// Show only favourites, including those that this browser lists no longer.
function showOnlyFavourites() {
  onlyFavourites = !onlyFavourites;
  byId("only-favourites").setAttribute("aria-pressed", String(onlyFavourites));
  for (const { images: _, ...request } of onlyFavourites ? favourites.requests() : []) {
    if (!runs.has(request.requestId)) follow(add(request, { isOld: true }));
  }
  filter();
}

// Hide what the search and the favourites leave out, and put a heading above each day.
function filter() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const run of runs.values()) {
    const text = `${run.request.input.prompt ?? ""} ${run.request.endpoint} ${run.seed ?? ""}`.toLowerCase();
    const isFavourite = ({ index }) => favourites.has(run.request.requestId, index);
    for (const result of run.results) result.node.hidden = onlyFavourites && !isFavourite(result);
    const isShown = !onlyFavourites || favourites.requests().some(({ requestId }) => requestId === run.request.requestId);
    run.node.hidden = !(isShown && words.every((word) => text.includes(word)));
  }
  for (const heading of list.querySelectorAll(".day")) heading.remove();
  let last = "";
  const visible = [...list.children].filter((node) => !node.hidden);
  for (const node of visible) {
    const day = dayOf(runs.get(node.dataset.requestId).request.startedAt);
    if (day !== last) node.before(element("li", { className: "day" }, element("h2", { textContent: day })));
    last = day;
  }
  byId("empty").hidden = visible.length > 0;
  const isNarrowed = onlyFavourites || words.length > 0;
  const more = byId("earlier").hidden ? "" : " Show earlier requests to search those, too.";
  byId("empty").textContent = isNarrowed ? `No image matches.${more}` : "Images you generate appear here.";
}

function dayOf(timestamp) {
  const day = new Date(timestamp).toDateString();
  if (day === new Date().toDateString()) return "Today";
  if (day === new Date(Date.now() - 24 * 3600 * 1000).toDateString()) return "Yesterday";
  return new Date(timestamp).toLocaleDateString([], { weekday: "long", day: "numeric", month: "long", year: "numeric" });
}

// The arrow keys move from image to image.
function moveFocus(event) {
  const links = [...list.querySelectorAll("li:not([hidden]) a.open")];
  const place = links.indexOf(event.target);
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (place < 0 || !step) return;
  event.preventDefault();
  links[place + step]?.focus();
}
