// The playground page: choose an endpoint, fill in its form, run it, and look at the results.

import * as api from "./api.js";
import { askForKey, withKey } from "./api_key.js";
import { byId, element } from "./elements.js";
import * as form from "./form.js";
import { dropped } from "./image_files.js";
import * as recentRuns from "./recent_runs.js";
import * as results from "./results.js";
import * as tabs from "./tabs.js";
import { imageToImageFor, inpaintingFor } from "./targets.js";

const config = await api.playgroundConfig();
const schemas = new Map();
let endpoint = "";
let fields = new Map();
let latestChoice = 0;

// Return an endpoint's schema: { properties, order, required, schemas }.
function schemaOf(name) {
  if (!schemas.has(name)) {
    const loading = api.openApiOf(name).then(form.schemaOf);
    schemas.set(name, loading);
    loading.catch(() => schemas.delete(name));
  }
  return schemas.get(name);
}

// Show another endpoint's form. The latest choice wins, whichever schema arrives first.
async function choose(name) {
  const choice = (latestChoice += 1);
  delete document.body.dataset.ready;
  try {
    const schema = await schemaOf(name);
    if (choice !== latestChoice) return;
    endpoint = name;
    localStorage.setItem("endpoint", name);
    byId("llms").href = `models/${name}/llms.txt`;
    const { prompt, image_url, image_size, seed } = form.read(fields);
    fields = form.build(schema, { first: byId("fields"), more: byId("more") }, onChange);
    // Keep these values from the previous form; the other fields start with the new endpoint's defaults.
    for (const [field, value] of Object.entries({ prompt, image_url, image_size, seed })) {
      // Without a default size, the image has the size of the input image.
      const isOfInput = field === "image_size" && fields.get(field)?.read() === undefined;
      if (value !== undefined && !isOfInput) fields.get(field)?.write(value);
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

function onChange() {
  showCode();
}

// Show the current form as programs, once the code tab is open.
async function showCode() {
  if (byId("code").hidden) return;
  const { show } = await import("./code_samples.js");
  show(byId("code"), endpoint, form.read(fields), { needsKey: config.needs_key, url: api.origin });
}

async function useSettings(name, input) {
  if (name !== endpoint) await choose(name);
  if (name !== endpoint) return;
  form.write(fields, input);
  onChange();
  byId("form").scrollIntoView({ block: "nearest" });
}

// Put an image into a field of an endpoint's form, and keep the rest of the form if it is that endpoint's.
async function useAsInput(url, name, path, prompt) {
  if (name !== endpoint) await choose(name);
  if (name !== endpoint) return;
  form.writeImage(fields, path, url);
  if (prompt && !fields.get("prompt")?.read()) fields.get("prompt")?.write(prompt);
  onChange();
  form.focus(fields, path);
}

// Open the brush over a result, in the form of an endpoint that takes a mask.
async function repaint(url, { endpoint: name, input }) {
  const target = inpaintingFor(config, name);
  if (target) await useAsInput(url, target, "image_url", input.prompt);
  const mask = fields.get("mask_url");
  if (!mask) return;
  mask.write(undefined);
  if (await mask.paint()) form.focus(fields, "prompt");
}

async function submit(name, input) {
  const { request_id: requestId } = await withKey(() => api.submit(name, input));
  const request = { endpoint: name, requestId, input, startedAt: Date.now() };
  results.follow(results.add(request));
  recentRuns.add(request);
}

async function run() {
  if (!(await form.settled(fields))) return;
  byId("problem").textContent = form.showProblems(fields, []);
  try {
    await submit(endpoint, form.read(fields));
  } catch (error) {
    byId("problem").textContent =
      error instanceof api.ApiError && error.problems.length
        ? form.showProblems(fields, error.problems)
        : error.message;
  }
}

// An image dropped next to the fields goes to the form's first image input, or to an endpoint that takes an image.
function onDrop(event) {
  event.preventDefault();
  const own = config.image_inputs[endpoint]?.[0];
  const { url } = dropped(event.dataTransfer);
  if (own) fields.get(own.split(".")[0])?.drop?.(event.dataTransfer);
  else if (url && config.paint_over.length) useAsInput(url, imageToImageFor(config, endpoint), "image_url");
}

tabs.start(byId("tabs"), showCode);
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
byId("form").addEventListener("dragover", (event) => event.preventDefault());
byId("form").addEventListener("drop", onDrop);
document.addEventListener("keydown", (event) => {
  const isSubmit = (event.ctrlKey || event.metaKey) && event.key === "Enter" && !event.repeat;
  if (isSubmit && !document.querySelector("dialog[open]")) run();
});
byId("reset").addEventListener("click", () => {
  form.write(fields, {});
  form.showProblems(fields, []);
  onChange();
});
byId("endpoint").addEventListener("change", () => choose(byId("endpoint").value));
byId("key").hidden = !config.needs_key;
byId("key").addEventListener("click", () => askForKey());
byId("endpoint").append(...config.endpoints.map((name) => element("option", { textContent: name })));

const last = localStorage.getItem("endpoint");
const first = config.endpoints.includes("fal-ai/flux/dev") ? "fal-ai/flux/dev" : config.endpoints[0];
await choose(config.endpoints.includes(last) ? last : first);
results.start({
  config, useSettings, useAsInput, submit, repaint,
  schemaOf: async (name) => (await schemaOf(name)).properties,
  onSeed: (seed) => fields.get("seed")?.setLastSeed?.(seed),
});
