// The page: choose an endpoint, fill its form, run, watch, keep.

import * as api from "./api.js";
import * as codeSamples from "./code_samples.js";
import * as form from "./form.js";
import { askForKey, withKey } from "./api_key.js";
import * as recentRuns from "./recent_runs.js";
import { Run } from "./run.js";

const at = (id) => document.getElementById(id);

let about = { endpoints: [], paint_over: [], needs_key: false };
let endpoint = "";
let fields = new Map();

let choices = 0;

// Another endpoint's form; the last one chosen wins, however long their descriptions take.
async function choose(name) {
  const choice = (choices += 1);
  delete document.body.dataset.ready;
  try {
    const described = await api.documentOf(name);
    if (choice !== choices) return;
    endpoint = name;
    localStorage.setItem("endpoint", name);
    at("llms").href = `models/${name}/llms.txt`;
    const { prompt, image_url, image_size, seed } = form.read(fields);
    fields = form.build(described, { first: at("fields"), more: at("more") }, showCode);
    // What was typed already is worth keeping; the rest has the new endpoint's own defaults.
    for (const [kept, value] of Object.entries({ prompt, image_url, image_size, seed })) {
      if (value !== undefined) fields.get(kept)?.write(value);
    }
    at("problem").textContent = "";
  } catch (error) {
    if (choice !== choices) return;
    at("problem").textContent = `${name}: ${error.message}`;
  }
  at("endpoint").value = endpoint;
  showCode();
  document.body.dataset.ready = endpoint;
}

const showCode = () => codeSamples.show(at("code"), endpoint, form.read(fields), { needsKey: about.needs_key, url: api.origin });

async function use(name, input) {
  if (name !== endpoint) await choose(name);
  if (name !== endpoint) return;
  form.write(fields, input);
  showCode();
  at("form").scrollIntoView({ block: "nearest" });
}

// The image-to-image endpoint that belongs to this endpoint, or else any.
const overFor = (name) => about.paint_over.find((over) => over === `${name}/image-to-image`) ?? about.paint_over[0];

async function run() {
  const input = form.read(fields);
  const strays = form.complain(fields, []);
  at("problem").textContent = strays;
  try {
    const { request_id: requestId } = await withKey(() => api.submit(endpoint, input));
    const started = { endpoint, requestId, input, startedAt: Date.now() };
    follow(show(started));
    recentRuns.add(started);
  } catch (error) {
    at("problem").textContent =
      error instanceof api.Refused && error.problems.length
        ? form.complain(fields, error.problems)
        : error.message;
  }
}

function show(started, isOld = false) {
  at("empty").hidden = true;
  const shown = new Run(started, {
    use,
    told: (seed) => isOld || fields.get("seed")?.told?.(seed),
    paintOver: about.paint_over.length ? (url) => use(overFor(started.endpoint), { prompt: started.input.prompt, image_url: url }) : null,
    forgotten: () => {
      recentRuns.remove(started.requestId);
      at("empty").hidden = at("runs").children.length > 0;
    },
  });
  at("runs")[isOld ? "append" : "prepend"](shown.node);
  return shown;
}

const follow = (shown) => withKey(() => shown.follow()).catch((error) => shown.fail(error));

// What else this key asked for, from whatever browser or program: page by page, from the server.
let cursor = null;
async function showEarlier() {
  const page = await withKey(() => api.earlier(cursor));
  const known = new Set([...at("runs").children].map((node) => node.dataset.requestId));
  for (const item of page.items.filter(({ request_id: id }) => !known.has(id))) {
    const { request_id: requestId, endpoint_id, json_input: input, sent_at } = item;
    const shown = show({ endpoint: endpoint_id, requestId, input, startedAt: Date.parse(sent_at) }, true);
    if (item.status_code === 200 && item.json_output) shown.finish(item.json_output);
    else follow(shown);
  }
  cursor = page.next_cursor;
  at("earlier").hidden = !page.has_more;
}

at("earlier").addEventListener("click", () => showEarlier().catch((error) => (at("problem").textContent = error.message)));

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => {
    for (const each of document.querySelectorAll("[role=tab]")) {
      const isChosen = each === tab;
      each.setAttribute("aria-selected", String(isChosen));
      each.tabIndex = isChosen ? 0 : -1;
      at(each.getAttribute("aria-controls")).hidden = !isChosen;
    }
  });
  tab.addEventListener("keydown", ({ key }) => {
    if (!["ArrowLeft", "ArrowRight"].includes(key)) return;
    const other = [...document.querySelectorAll("[role=tab]")].find((each) => each !== tab);
    other.focus();
    other.click();
  });
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
document.addEventListener("keydown", (event) => {
  const isWanted = (event.ctrlKey || event.metaKey) && event.key === "Enter" && !event.repeat;
  if (isWanted && !at("ask").open) run();
});
at("reset").addEventListener("click", () => {
  form.write(fields, {});
  form.complain(fields, []);
  showCode();
});
at("endpoint").addEventListener("change", () => choose(at("endpoint").value));

about = await api.playground();
at("key").hidden = !about.needs_key;
at("key").addEventListener("click", () => askForKey());
at("endpoint").append(...about.endpoints.map((name) => form.element("option", { textContent: name })));
const last = localStorage.getItem("endpoint");
const first = about.endpoints.includes("fal-ai/flux/dev") ? "fal-ai/flux/dev" : about.endpoints[0];
await choose(about.endpoints.includes(last) ? last : first);
for (const started of recentRuns.all()) follow(show(started, true));
