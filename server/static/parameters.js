// The parameters of a result, as a list to read and as rows to compare.

import { element } from "./elements.js";
import { labelOf } from "./labels.js";
import { seedOf } from "./variations.js";

const text = (value) => {
  if (typeof value === "string") return value.startsWith("data:") ? "an image given as a data URI" : value;
  return Array.isArray(value) || typeof value === "object" ? JSON.stringify(value) : String(value);
};

// Return the parameters in the order of reading: [["Prompt", "a fox"], ...].
export function parametersOf({ run, index, width, height }) {
  const { prompt, seed: _, image_size: __, ...others } = run.request.input;
  const rows = {
    Prompt: prompt, Endpoint: run.request.endpoint, Seed: seedOf(run.seed, index), Size: width && height ? `${width} × ${height}` : undefined,
    "Generation time": run.seconds === undefined ? undefined : `${run.seconds.toFixed(2)} s`,
    Sent: new Date(run.request.startedAt).toLocaleString(), ...others, "Request ID": run.request.requestId,
  };
  return Object.entries(rows).filter(([, value]) => value !== undefined && value !== "").map(([name, value]) => [labelOf(name), text(value)]);
}

export function parameterList(result) {
  const rows = parametersOf(result).flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]);
  return element("dl", { className: "parameters" }, ...rows);
}

// Return the parameters in which two results differ: [["Seed", "1", "2"], ...].
export function differences(left, right) {
  const [first, second] = [Object.fromEntries(parametersOf(left)), Object.fromEntries(parametersOf(right))];
  const names = [...new Set([...Object.keys(first), ...Object.keys(second)])];
  return names.map((name) => [name, first[name] ?? "–", second[name] ?? "–"]).filter(([name, a, b]) => name !== "Request ID" && a !== b);
}
