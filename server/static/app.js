// The page: choose an endpoint, fill its form, run, watch, keep.

import * as api from "./api.js";
import * as code from "./code.js";
import * as form from "./form.js";
import { withKey } from "./key.js";
import { Run } from "./run.js";

const at = (id) => document.getElementById(id);
const KEPT = 60;

let about = { endpoints: [], paintOver: [], needsKey: false };
let endpoint = "";
let fields = new Map();

// What this browser ran, the newest first: { endpoint, requestId, input, startedAt }.
const history = {
  all: () => JSON.parse(localStorage.getItem("runs") ?? "[]"),
  add: (run) => localStorage.setItem("runs", JSON.stringify([run, ...history.all()].slice(0, KEPT))),
  remove: (requestId) =>
    localStorage.setItem("runs", JSON.stringify(history.all().filter((run) => run.requestId !== requestId))),
};

async function choose(name) {
  delete document.body.dataset.ready;
  endpoint = name;
  localStorage.setItem("endpoint", name);
  at("endpoint").value = name;
  at("llms").href = `models/${name}/llms.txt`;
  const described = await api.documentOf(name);
  const { prompt, image_url, image_size, seed } = form.read(fields);
  fields = form.build(described, { first: at("fields"), more: at("more") }, showCode);
  // What was typed already is worth keeping; the rest has the new endpoint's own defaults.
  for (const [kept, value] of Object.entries({ prompt, image_url, image_size, seed })) {
    if (value !== undefined) fields.get(kept)?.write(value);
  }
  at("problem").textContent = "";
  showCode();
  document.body.dataset.ready = name;
}

const showCode = () => code.show(at("code"), endpoint, form.read(fields), { ...about, url: location.origin });

async function use(name, input) {
  if (name !== endpoint) await choose(name);
  form.write(fields, input);
  showCode();
  at("form").scrollIntoView({ block: "nearest" });
}

// Of the endpoints that paint over a picture, the one that belongs to this, or else any.
const overFor = (name) => about.paintOver.find((over) => over === `${name}/image-to-image`) ?? about.paintOver[0];

async function run() {
  const input = form.read(fields);
  const strays = form.complain(fields, []);
  at("problem").textContent = strays;
  try {
    const { request_id: requestId } = await withKey(() => api.submit(endpoint, input));
    const started = { endpoint, requestId, input, startedAt: Date.now() };
    history.add(started);
    follow(show(started));
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
    told: (seed) => fields.get("seed")?.told?.(seed),
    paintOver: about.paintOver.length ? (url) => use(overFor(started.endpoint), { prompt: started.input.prompt, image_url: url }) : null,
    forget: () => {
      history.remove(started.requestId);
      shown.node.remove();
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
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") run();
});
at("reset").addEventListener("click", () => {
  form.write(fields, {});
  form.complain(fields, []);
  showCode();
});
at("endpoint").addEventListener("change", () => choose(at("endpoint").value));

about = await api.playground();
at("endpoint").append(...about.endpoints.map((name) => form.element("option", { textContent: name })));
const last = localStorage.getItem("endpoint");
const first = about.endpoints.includes("fal-ai/flux/dev") ? "fal-ai/flux/dev" : about.endpoints[0];
await choose(about.endpoints.includes(last) ? last : first);
for (const started of history.all()) follow(show(started, true));
