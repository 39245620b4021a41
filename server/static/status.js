// The operator's view, read anew every few seconds.

import * as api from "./api.js";
import { element } from "./form.js";
import { withKey } from "./key.js";

const at = (id) => document.getElementById(id);
const EVERY = 5000;

const seconds = (value) => (value === null ? "–" : value < 60 ? `${value.toFixed(1)} s` : `${Math.round(value / 60)} min`);
const bytes = (value) => (value < 1e9 ? `${(value / 1e6).toFixed(0)} MB` : `${(value / 1e9).toFixed(1)} GB`);
const when = (value) => new Date(value * 1000).toLocaleString();

const NOW = {
  queue_length: ["waiting", String],
  queue_oldest_seconds: ["the next one waits for", seconds],
  requests_running: ["being painted", String],
  webhooks_due: ["webhooks to send", String],
  files_bytes: ["pictures and uploads kept", bytes],
  disk_free_bytes: ["free on the disk", bytes],
  memory_resident_bytes: ["memory of the process", bytes],
};

function table(place, columns, rows) {
  const head = element("tr", {}, ...Object.values(columns).map(([words]) => element("th", { scope: "col", textContent: words })));
  const body = rows.map((row) =>
    element("tr", {}, ...Object.entries(columns).map(([name, [, shown]]) => element("td", { textContent: shown(row[name]) }))));
  const nothing = element("tr", {}, element("td", { colSpan: Object.keys(columns).length, textContent: "nothing yet" }));
  place.replaceChildren(element("thead", {}, head), element("tbody", {}, ...(body.length ? body : [nothing])));
}

function plot(place, values) {
  const highest = Math.max(1, ...values);
  const bars = values.map((value) => {
    const bar = element("span", { title: String(value) });
    bar.style.height = `${(100 * value) / highest}%`;
    return bar;
  });
  place.replaceChildren(...bars);
  place.setAttribute("aria-label", `${values.reduce((a, b) => a + b, 0)} in the last hour, at most ${highest} a minute`);
}

function show(seen) {
  const loading = seen.loading && `loading ${seen.loading.component}, ${bytes(seen.loading.loaded_bytes)} of ${bytes(seen.loading.total_bytes)}`;
  at("state").textContent = loading ?? `ready, version ${seen.version}`;
  at("now").replaceChildren(
    ...Object.entries(NOW).flatMap(([name, [words, shown]]) => [
      element("dt", { textContent: words }), element("dd", { textContent: shown(seen.now[name]) }),
    ]),
  );
  plot(at("minutes"), seen.minutes.map((minute) => minute.billable_units));
  table(at("endpoints"), { endpoint: ["endpoint", String], completed: ["completed", String], wait: ["waited", seconds], inference: ["took", seconds] }, seen.endpoints);
  table(at("usage"), { owner: ["key", String], requests: ["requests", String], billable_units: ["billable units", String] }, seen.usage);
  table(at("failures"), { finished_at: ["when", when], endpoint: ["endpoint", String], error: ["error", String], request_id: ["request", String] }, seen.failures);
  document.body.dataset.ready = "true";
}

for (;;) {
  try {
    show(await withKey(api.status));
  } catch (error) {
    at("state").textContent = error.message;
  }
  await new Promise((resolve) => setTimeout(resolve, EVERY));
}
