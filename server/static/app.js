// The playground page: choose an endpoint, fill in its form, run it, follow the request and keep a history.

import * as api from "./api.js";
import * as codeSamples from "./code_samples.js";
import * as form from "./form.js";
import { askForKey, withKey } from "./api_key.js";
import * as recentRuns from "./recent_runs.js";
import { Run } from "./run.js";

const byId = (id) => document.getElementById(id);

let config = { endpoints: [], paint_over: [], needs_key: false };
let endpoint = "";
let fields = new Map();

let latestChoice = 0;

// Show another endpoint's form. The latest choice wins, whichever description arrives first.
async function choose(name) {
  const choice = (latestChoice += 1);
  delete document.body.dataset.ready;
  try {
    const openApi = await api.openApiOf(name);
    if (choice !== latestChoice) return;
    endpoint = name;
    localStorage.setItem("endpoint", name);
    byId("llms").href = `models/${name}/llms.txt`;
    const { prompt, image_url, image_size, seed } = form.read(fields);
    fields = form.build(openApi, { first: byId("fields"), more: byId("more") }, showCode);
    // Keep these values from the previous form; the other fields start with the new endpoint's defaults.
    for (const [field, value] of Object.entries({ prompt, image_url, image_size, seed })) {
      if (value !== undefined) fields.get(field)?.write(value);
    }
    byId("problem").textContent = "";
  } catch (error) {
    if (choice !== latestChoice) return;
    byId("problem").textContent = `${name}: ${error.message}`;
  }
  byId("endpoint").value = endpoint;
  showCode();
  document.body.dataset.ready = endpoint;
}

const showCode = () => codeSamples.show(byId("code"), endpoint, form.read(fields), { needsKey: config.needs_key, url: api.origin });

async function useSettings(name, input) {
  if (name !== endpoint) await choose(name);
  if (name !== endpoint) return;
  form.write(fields, input);
  showCode();
  byId("form").scrollIntoView({ block: "nearest" });
}

// The image-to-image variant of an endpoint, or the first image-to-image endpoint if there is none.
const imageToImageFor = (name) => config.paint_over.find((variant) => variant === `${name}/image-to-image`) ?? config.paint_over[0];

async function submit() {
  const input = form.read(fields);
  byId("problem").textContent = form.showProblems(fields, []);
  try {
    const { request_id: requestId } = await withKey(() => api.submit(endpoint, input));
    const request = { endpoint, requestId, input, startedAt: Date.now() };
    follow(show(request));
    recentRuns.add(request);
  } catch (error) {
    byId("problem").textContent =
      error instanceof api.ApiError && error.problems.length
        ? form.showProblems(fields, error.problems)
        : error.message;
  }
}

function show(request, isOld = false) {
  byId("empty").hidden = true;
  const useAsInput = (url) => useSettings(imageToImageFor(request.endpoint), { prompt: request.input.prompt, image_url: url });
  const run = new Run(request, {
    useSettings,
    useAsInput: config.paint_over.length ? useAsInput : null,
    onSeed: (seed) => isOld || fields.get("seed")?.setLastSeed?.(seed),
    onDelete: () => {
      recentRuns.remove(request.requestId);
      byId("empty").hidden = byId("runs").children.length > 0;
    },
  });
  byId("runs")[isOld ? "append" : "prepend"](run.node);
  return run;
}

const follow = (run) => withKey(() => run.follow()).catch((error) => run.fail(error));

// Load this key's other requests from the server, page by page, including those of other browsers and programs.
let cursor = null;
async function showEarlier() {
  const page = await withKey(() => api.listRequests(cursor));
  const known = new Set([...byId("runs").children].map((node) => node.dataset.requestId));
  for (const item of page.items.filter(({ request_id: id }) => !known.has(id))) {
    const { request_id: requestId, endpoint_id, json_input: input, sent_at } = item;
    const run = show({ endpoint: endpoint_id, requestId, input, startedAt: Date.parse(sent_at) }, true);
    if (item.status_code === 200 && item.json_output) run.finish(item.json_output);
    else follow(run);
  }
  cursor = page.next_cursor;
  byId("earlier").hidden = !page.has_more;
}

byId("earlier").addEventListener("click", () => showEarlier().catch((error) => (byId("problem").textContent = error.message)));

const tabs = [...document.querySelectorAll("[role=tab]")];
for (const tab of tabs) {
  tab.addEventListener("click", () => {
    for (const each of tabs) {
      const isChosen = each === tab;
      each.setAttribute("aria-selected", String(isChosen));
      each.tabIndex = isChosen ? 0 : -1;
      byId(each.getAttribute("aria-controls")).hidden = !isChosen;
    }
  });
  tab.addEventListener("keydown", ({ key }) => {
    if (!["ArrowLeft", "ArrowRight"].includes(key)) return;
    const other = tabs.find((each) => each !== tab);
    other.focus();
    other.click();
  });
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  const isSubmit = (event.ctrlKey || event.metaKey) && event.key === "Enter" && !event.repeat;
  if (isSubmit && !byId("ask").open) submit();
});
byId("reset").addEventListener("click", () => {
  form.write(fields, {});
  form.showProblems(fields, []);
  showCode();
});
byId("endpoint").addEventListener("change", () => choose(byId("endpoint").value));

config = await api.playgroundConfig();
byId("key").hidden = !config.needs_key;
byId("key").addEventListener("click", () => askForKey());
byId("endpoint").append(...config.endpoints.map((name) => form.element("option", { textContent: name })));
const last = localStorage.getItem("endpoint");
const first = config.endpoints.includes("fal-ai/flux/dev") ? "fal-ai/flux/dev" : config.endpoints[0];
await choose(config.endpoints.includes(last) ? last : first);
for (const request of recentRuns.all()) follow(show(request, true));
