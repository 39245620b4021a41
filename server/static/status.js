// The operator's view, read anew every few seconds.

import * as api from "./api.js";
import { element } from "./form.js";
import { withKey } from "./api_key.js";

const at = (id) => document.getElementById(id);
const EVERY = 5000;

const seconds = (value) => {
  if (value === null) return "–";
  if (value >= 60) return `${Math.round(value / 60)} min`;
  return value >= 1 ? `${value.toFixed(1)} s` : `${(1000 * value).toFixed(0)} ms`;
};
const bytes = (value) => (value < 1e9 ? `${(value / 1e6).toFixed(0)} MB` : `${(value / 1e9).toFixed(1)} GB`);
const when = (value) => new Date(value * 1000).toLocaleString();
const count = (value) => value.toLocaleString();

const NOW = {
  queue_length: ["waiting", count],
  queue_oldest_seconds: ["the longest wait", seconds],
  requests_running: ["being painted", count],
  webhooks_due: ["webhooks to send", count],
  files_bytes: ["pictures and uploads kept", bytes],
  disk_free_bytes: ["free on the disk", bytes],
  memory_resident_bytes: ["memory of the process", bytes],
};

// One small plot each of the last hour: its words, a minute's value, and how the highest is written.
const PLOTS = [
  ["Pictures a minute", (minute) => minute.pictures, count],
  ["Billable megapixels a minute", (minute) => minute.billable_units, count],
  ["Wait in the queue", (minute) => minute.wait, seconds],
  ["Time to paint one", (minute) => minute.inference, seconds],
];

function table(place, columns, rows) {
  const head = element("tr", {}, ...Object.values(columns).map(([words]) => element("th", { scope: "col", textContent: words })));
  const body = rows.map((row) =>
    element("tr", {}, ...Object.entries(columns).map(([name, [, shown]]) => element("td", { textContent: shown(row[name]) }))));
  const nothing = element("tr", {}, element("td", { colSpan: Object.keys(columns).length, textContent: "nothing yet" }));
  place.replaceChildren(element("thead", {}, head), element("tbody", {}, ...(body.length ? body : [nothing])));
}

function plot(minutes, [words, valueOf, written]) {
  const values = minutes.map(valueOf);
  const known = values.filter((value) => value !== null);
  const highest = Math.max(0, ...known);
  const bars = values.map((value) => {
    const bar = element("span");
    bar.style.height = `${highest ? (100 * (value ?? 0)) / highest : 0}%`;
    return bar;
  });
  const chart = element("div", { className: "bars" }, ...bars);
  chart.setAttribute("role", "img");
  const most = known.length ? `at most ${written(highest)}` : "nothing yet";
  chart.setAttribute("aria-label", `${words}, the last hour: ${most}`);
  const scale = element("p", { className: "scale" }, element("span", { textContent: "an hour ago" }), element("span", { textContent: most }), element("span", { textContent: "now" }));
  return element("figure", {}, element("figcaption", { textContent: words }), chart, scale);
}

function show(seen) {
  const loading = seen.loading && `loading ${seen.loading.component}, ${bytes(seen.loading.loaded_bytes)} of ${bytes(seen.loading.total_bytes)}`;
  at("state").textContent = loading ?? `ready, version ${seen.version}`;
  at("now").replaceChildren(
    ...Object.entries(NOW).flatMap(([name, [words, shown]]) => [
      element("dt", { textContent: words }), element("dd", { textContent: shown(seen.now[name]) }),
    ]),
  );
  at("plots").replaceChildren(...PLOTS.map((each) => plot(seen.minutes, each)));
  // One line for each set of weights on each GPU; one without, too.
  const gpus = seen.gpus.flatMap((gpu) => {
    const engines = Object.entries(gpu.engines);
    return (engines.length ? engines : [["–", null]]).map(([weights, engine]) => ({
      ...gpu,
      weights,
      device: engine?.device ?? "–",
      dtype: engine?.dtype ?? "–",
      memory: engine?.memory ?? "–",
      acceleration: engine?.acceleration.join(", ") ?? "–",
      used: engine?.used_bytes == null ? "–" : `${bytes(engine.used_bytes)} of ${bytes(engine.total_bytes)}`,
      state: gpu.failure ? `${gpu.state}: ${gpu.failure}` : gpu.state,
    }));
  });
  const ofCluster = seen.gpus.some((gpu) => gpu.node)
    ? { name: ["GPU", String], node: ["machine", String], state: ["state", String], num_running: ["requests", count], num_restarts: ["times lost", count] }
    : {};
  table(at("gpus"), { ...ofCluster, weights: ["weights", String], device: ["device", String], dtype: ["type", String], memory: ["memory plan", String], used: ["device memory", String], acceleration: ["tiers ready", String] }, gpus);
  table(at("steps"), { size: ["size", String], acceleration: ["tier", String], count: ["steps", count], seconds: ["one takes", seconds] }, seen.steps);
  table(at("endpoints"), { endpoint: ["endpoint", String], completed: ["completed", count], wait: ["waited", seconds], inference: ["took", seconds] }, seen.endpoints);
  table(at("usage"), { owner: ["key", String], requests: ["requests", count], billable_units: ["billable units", count] }, seen.usage);
  table(at("failures"), { finished_at: ["when", when], endpoint: ["endpoint", String], error: ["error", String], request_id: ["request", String] }, seen.failures);
  document.body.dataset.ready = "true";
}

let isRefused = false;
for (;;) {
  try {
    show(await (isRefused ? api.status() : withKey(api.status)));
    isRefused = false;
  } catch (error) {
    at("state").textContent = error.message;
    // Ask once: a person who cancels is not asked again.
    isRefused = [401, 403].includes(error.status);
  }
  await new Promise((resolve) => setTimeout(resolve, EVERY));
}
