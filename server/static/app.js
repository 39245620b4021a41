// The playground page: choose an endpoint, fill in its form, run it, and look at the results.

import * as api from "./api.js";
import { askForKey, withKey } from "./api_key.js";
import { announce, button, byId, element } from "./elements.js";
import * as form from "./form.js";
import { copyText, dropped } from "./image_files.js";
import * as recentRuns from "./recent_runs.js";
import * as results from "./results.js";
import * as savedSettings from "./saved_settings.js";
import * as sending from "./sending.js";
import * as tabs from "./tabs.js";
import { imageToImageFor, inpaintingFor } from "./targets.js";

const config = await api.playgroundConfig();
const schemas = new Map();
let endpoint = "";
let fields = new Map();
let latestChoice = 0;
// The request of an image whose programs the code tab shows, { endpoint, input }; null for the form's.
let shownRequest = null;

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
    const previous = form.read(fields);
    fields = form.build(schema, { first: byId("fields"), more: byId("more") }, onChange);
    fill(previous, savedSettings.settingsOf(name));
    sending.place(fields);
    byId("problem").textContent = "";
    shownRequest = null;
  } catch (error) {
    if (choice !== latestChoice) return;
    byId("problem").textContent = `${name}: ${error.message}`;
  }
  byId("endpoint").value = endpoint;
  showCount();
  showCode();
  document.body.dataset.ready = endpoint;
}

// Fill a new form with what it had last, or else with the endpoint's defaults and what fits of the previous form. The
// prompt and the image are always those of the previous form, if it had them, and so is what its lines mean.
function fill({ prompt, image_url, image_size, seed }, saved) {
  if (saved) {
    form.write(fields, saved.input);
    sending.write({ ...saved.options, ...(prompt && { isPromptPerLine: sending.read().isPromptPerLine }) });
  }
  // Without a default size, the image has the size of the input image.
  const size = fields.get("image_size")?.read() === undefined ? undefined : image_size;
  const kept = saved ? { prompt, image_url } : { prompt, image_url, image_size: size, seed };
  for (const [field, value] of Object.entries(kept)) {
    if (value !== undefined && value !== "") fields.get(field)?.write(value);
  }
}

const settings = () => ({ input: form.read(fields), options: sending.read() });

// Remove the settings from the address, because they are not those of the form any more.
function clearLink() {
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
}

function onChange() {
  clearLink();
  savedSettings.remember(endpoint, settings());
  shownRequest = null;
  showCount();
  showCode();
}

const inputsToSend = () => sending.inputsOf(form.read(fields), sending.read(), fields.has("seed"));
const summary = () => sending.summaryOf(form.read(fields), sending.read(), fields.has("seed"));

// Show on the button how many requests it sends.
function showCount() {
  const { number } = summary();
  byId("run-label").textContent = number > 1 ? `Run ${number}` : "Run";
}

// Show the form's request, or that of an image, as programs if the code tab is open.
async function showCode() {
  if (byId("code").hidden) return;
  const { show } = await import("./code_samples.js");
  const site = { needsKey: config.needs_key, url: api.origin };
  const { note, endpoint: name, input } = shownRequest ? { ...shownRequest, note: noteOfImage() } : formRequest();
  show(byId("code"), note, name, input, site, Boolean(config.image_inputs[name]));
}

// Return the form's first request, and a note if there are others. A seed that the page would choose is left out.
function formRequest() {
  const { number, prompt } = summary();
  const note = [number > 1 ? `The form sends ${number} requests. These programs send the first.` : "These programs send the request of the form."];
  return { note, endpoint, input: { ...form.read(fields), ...(prompt !== undefined && { prompt }) } };
}

function noteOfImage() {
  const showForm = button("Show the form's", () => {
    shownRequest = null;
    byId("tab-code").focus();
    showCode();
  });
  return ["These programs send the request of the chosen image. ", showForm];
}

// Show the request of an image as programs. The form stays as it is.
function showCodeOf(name, input) {
  if (!config.endpoints.includes(name)) {
    byId("problem").textContent = `This server has no endpoint ${name}.`;
    return;
  }
  shownRequest = { endpoint: name, input };
  chooseTab(byId("tab-code"));
  byId("tab-code").focus();
  announce("The programs send the request of the chosen image.");
}

// Without `options`, set the form to one request and keep its priority.
async function useSettings(name, input, options = { priority: sending.read().priority }) {
  if (name !== endpoint) await choose(name);
  if (name !== endpoint) return;
  form.write(fields, input);
  sending.write(options);
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
async function repaint(url, { endpoint: source, input }) {
  const name = inpaintingFor(config, source);
  if (!name) return;
  await useAsInput(url, name, "image_url");
  const mask = fields.get("mask_url");
  if (name !== endpoint || !mask) return;
  mask.write(undefined);
  fields.get("prompt")?.write(input.prompt);
  const hasMask = await mask.draw();
  if (name !== endpoint) return;
  form.focus(fields, hasMask ? "prompt" : "mask_url");
  if (hasMask) document.activeElement.select?.();
  if (hasMask) announce(`The form of ${name} now has the mask. Describe what should be there, then press Run.`);
}

async function submit(name, input, priority = sending.read().priority) {
  const { request_id: requestId } = await withKey(() => api.submit(name, input, priority));
  const request = { endpoint: name, requestId, input, startedAt: Date.now(), ...(priority === "low" && { priority }) };
  // First, so that the request counts as this browser's.
  recentRuns.add(request);
  results.follow(results.add(request));
}

async function run() {
  if (!(await form.settled(fields))) return;
  byId("problem").textContent = form.showProblems(fields, []);
  const [name, { priority }] = [endpoint, sending.read()];
  let [sent, inputs] = [0, []];
  try {
    inputs = inputsToSend();
    for (const input of inputs) {
      await submit(name, input, priority);
      sent += 1;
    }
    // On a phone, the results are below the form.
    if (matchMedia("(max-width: 760px)").matches) byId("images").scrollIntoView();
    announce(sent === 1 ? "The request is sent." : `${sent} requests are sent.`);
  } catch (error) {
    const problem = error instanceof api.ApiError && error.problems.length ? form.showProblems(fields, error.problems) : error.message;
    byId("problem").textContent = sent ? `${sent} of ${inputs.length} requests are sent. ${problem}` : problem;
  }
}

// Copy a link that holds the settings. Without access to the clipboard, show the link as the page's address.
async function share() {
  const fragment = savedSettings.toFragment(endpoint, settings());
  try {
    await copyText(`${location.href.split("#")[0]}${fragment}`);
    announce("The link is copied.");
    byId("share").textContent = "Copied";
    setTimeout(() => (byId("share").textContent = "Copy link"), 2000);
  } catch {
    history.replaceState(null, "", fragment);
    byId("problem").textContent = "The link is now the address of this page: copy it from the address bar.";
  }
}

// Use the settings of the link that opened the page, if it holds any. They stay in the address until the form changes.
async function useLink() {
  const { hash } = location;
  const link = savedSettings.fromFragment(hash);
  if (!link) return;
  clearLink();
  if (!config.endpoints.includes(link.endpoint)) {
    byId("problem").textContent = `This server has no endpoint ${link.endpoint}, which the link is for.`;
    return;
  }
  await useSettings(link.endpoint, link.input, link.options);
  if (endpoint === link.endpoint) history.replaceState(null, "", hash);
}

// An image dropped next to the fields goes to the form's first image input, or to an endpoint that takes an image.
function onDrop(event) {
  event.preventDefault();
  const own = config.image_inputs[endpoint]?.[0];
  const { url } = dropped(event.dataTransfer);
  if (own) fields.get(own.split(".")[0])?.drop?.(event.dataTransfer);
  else if (url && config.image_to_image.length) useAsInput(url, imageToImageFor(config, endpoint), "image_url");
}

const chooseTab = tabs.start(byId("tabs"), () => {
  if (byId("code").hidden) shownRequest = null;
  showCode();
});
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
  sending.write({});
  form.showProblems(fields, []);
  onChange();
  savedSettings.forget(endpoint);
});
sending.start(onChange);
byId("share").addEventListener("click", share);
addEventListener("hashchange", useLink);
byId("endpoint").addEventListener("change", () => {
  clearLink();
  choose(byId("endpoint").value);
});
byId("key").hidden = !config.needs_key;
byId("key").addEventListener("click", () => askForKey());
byId("endpoint").append(...config.endpoints.map((name) => element("option", { textContent: name })));

const last = localStorage.getItem("endpoint");
const first = config.endpoints.includes("fal-ai/flux/dev") ? "fal-ai/flux/dev" : config.endpoints[0];
const linked = savedSettings.fromFragment(location.hash)?.endpoint;
if (!config.endpoints.includes(linked)) await choose(config.endpoints.includes(last) ? last : first);
await useLink();
results.start({
  config, useSettings, showCodeOf, useAsInput, submit, repaint,
  schemaOf: async (name) => (await schemaOf(name)).properties,
  onSeed: (seed) => fields.get("seed")?.setLastSeed?.(seed),
});
