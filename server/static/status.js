// The operator's status page, refreshed every few seconds.

import * as api from "./api.js";
import { byId, element } from "./elements.js";
import { withKey } from "./api_key.js";

const REFRESH_INTERVAL_MS = 5000;

const seconds = (value) => {
  if (value === null) return "–";
  if (value >= 60) return `${Math.round(value / 60)} min`;
  return value >= 1 ? `${value.toFixed(1)} s` : `${(1000 * value).toFixed(0)} ms`;
};
const bytes = (value) => (value < 1e9 ? `${(value / 1e6).toFixed(0)} MB` : `${(value / 1e9).toFixed(1)} GB`);
const time = (value) => new Date(value * 1000).toLocaleString();
const count = (value) => value.toLocaleString();
// The server counts requests without a key under the name "everybody" (ANONYMOUS in server/auth.py).
const owner = (value) => (value === "everybody" ? "No key" : value);

const NOW = {
  queue_length: ["Waiting", count],
  queue_oldest_seconds: ["Longest wait", seconds],
  requests_running: ["Generating", count],
  webhooks_due: ["Pending webhooks", count],
  files_bytes: ["Stored images and uploads", bytes],
  disk_free_bytes: ["Free disk space", bytes],
  memory_resident_bytes: ["Process memory", bytes],
};

// The plots of the last hour: the label, the value of a minute, and the format of the highest value.
const PLOTS = [
  ["Images per minute", (minute) => minute.images, count],
  ["Billable megapixels per minute", (minute) => minute.billable_units, count],
  ["Mean queue wait", (minute) => minute.wait, seconds],
  ["Mean generation time", (minute) => minute.inference, seconds],
];

// The columns of each table: for each value's name, the label of its column and its format.
const CLUSTER_COLUMNS = {
  name: ["GPU", String],
  node: ["Machine", String],
  state: ["State", String],
  num_running: ["Requests", count],
  num_restarts: ["Restarts", count],
};
const WEIGHTS_COLUMNS = {
  weights: ["Weights", String],
  device: ["Device", String],
  form: ["Form of the files", String],
  dtype: ["Data type", String],
  memory: ["Memory plan", String],
  used: ["Device memory", String],
  acceleration: ["Acceleration tiers ready", String],
  way: ["Transformer runs", String],
};
// Shown only if something is not available.
const UNAVAILABLE_COLUMN = { unavailable: ["Not available", String] };
const STEPS_COLUMNS = {
  size: ["Size", String],
  acceleration: ["Acceleration", String],
  count: ["Steps", count],
  seconds: ["Mean time", seconds],
};
const TIMES_COLUMNS = {
  size: ["Size", String],
  acceleration: ["Acceleration", String],
  requests: ["Requests", count],
  mean: ["Mean", seconds],
  fastest: ["Fastest", seconds],
  slowest: ["Slowest", seconds],
};
const ENDPOINTS_COLUMNS = {
  endpoint: ["Endpoint", String],
  completed: ["Completed", count],
  wait: ["Mean wait", seconds],
  inference: ["Mean time", seconds],
};
const USAGE_COLUMNS = {
  owner: ["Key", owner],
  requests: ["Requests", count],
  billable_units: ["Billable units", count],
};
const FAILURES_COLUMNS = {
  finished_at: ["Time", time],
  endpoint: ["Endpoint", String],
  error: ["Error", String],
  request_id: ["Request ID", String],
};

// With the operator's price, shown with two decimals: a price is a sum of money.
const costColumn = (price) => ({ cost: [`At fal, at ${price} a megapixel`, (value) => value.toFixed(2)] });

// The cost at fal of each key's images, and of all of them.
function usageRows(usage, price) {
  const rows = usage.map((row) => ({ ...row, cost: price * row.billable_units }));
  const sum = (name) => rows.reduce((total, row) => total + row[name], 0);
  const total = { owner: "All keys", requests: sum("requests"), billable_units: sum("billable_units"), cost: sum("cost") };
  return price && rows.length > 1 ? [...rows, total] : rows;
}

function fillTable(table, columns, rows) {
  const head = element("tr", {}, ...Object.values(columns).map(([label]) => element("th", { scope: "col", textContent: label })));
  const body = rows.map((row) =>
    element("tr", {}, ...Object.entries(columns).map(([name, [, format]]) => element("td", { textContent: format(row[name]) }))));
  const empty = element("tr", {}, element("td", { colSpan: Object.keys(columns).length, textContent: "None yet" }));
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...(body.length ? body : [empty])));
}

function plot(minutes, [label, valueOf, format]) {
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
  const peak = known.length ? `peak ${format(highest)}` : "no data yet";
  chart.setAttribute("aria-label", `${label}, last hour: ${peak}`);
  const scale = element("p", { className: "axis" }, ...["1 hour ago", peak, "now"].map((text) => element("span", { textContent: text })));
  return element("figure", {}, element("figcaption", { textContent: label }), chart, scale);
}

// One row for each set of weights on each GPU. A GPU without weights has one row, too.
const gpuRows = (gpus) =>
  gpus.flatMap((gpu) => {
    const engines = Object.entries(gpu.engines);
    return (engines.length ? engines : [["–", null]]).map(([weights, engine]) => ({
      ...gpu,
      weights,
      device: engine?.device ?? "–",
      form: engine?.form || "–",
      dtype: engine?.dtype ?? "–",
      memory: engine?.memory ?? "–",
      acceleration: engine?.acceleration.join(", ") ?? "–",
      way: engine?.way || "–",
      unavailable: engine?.unavailable.join("; ") || "–",
      used: engine?.used_bytes == null ? "–" : `${bytes(engine.used_bytes)} of ${bytes(engine.total_bytes)}`,
      state: gpu.failure ? `${gpu.state}: ${gpu.failure}` : gpu.state,
    }));
  });

function show(status) {
  const { loading } = status;
  const progress = loading && `Loading ${loading.component}, ${bytes(loading.loaded_bytes)} of ${bytes(loading.total_bytes)}`;
  byId("state").textContent = progress ?? `Ready, version ${status.version}`;
  byId("now").replaceChildren(
    ...Object.entries(NOW).flatMap(([name, [label, format]]) => [
      element("dt", { textContent: label }), element("dd", { textContent: format(status.now[name]) }),
    ]),
  );
  byId("plots").replaceChildren(...PLOTS.map((each) => plot(status.minutes, each)));
  const isCluster = status.gpus.some((gpu) => gpu.node);
  const rows = gpuRows(status.gpus);
  const isLimited = rows.some((row) => row.unavailable !== "–");
  fillTable(
    byId("gpus"),
    { ...(isCluster ? CLUSTER_COLUMNS : {}), ...WEIGHTS_COLUMNS, ...(isLimited ? UNAVAILABLE_COLUMN : {}) },
    rows,
  );
  fillTable(byId("steps"), STEPS_COLUMNS, status.steps);
  fillTable(byId("endpoints"), ENDPOINTS_COLUMNS, status.endpoints);
  fillTable(byId("times"), TIMES_COLUMNS, status.times);
  const price = status.fal_price;
  fillTable(byId("usage"), { ...USAGE_COLUMNS, ...(price ? costColumn(price) : {}) }, usageRows(status.usage, price));
  fillTable(byId("failures"), FAILURES_COLUMNS, status.failures);
  document.body.dataset.ready = "true";
}

let isRefused = false;
for (;;) {
  try {
    show(await (isRefused ? api.status() : withKey(api.status)));
    isRefused = false;
  } catch (error) {
    byId("state").textContent = error.message;
    // Ask for a key only once, so that the dialog does not return after the user cancels it.
    isRefused = [401, 403].includes(error.status);
  }
  await new Promise((resolve) => setTimeout(resolve, REFRESH_INTERVAL_MS));
}
