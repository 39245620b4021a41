// How a form is sent: each line of the prompt as a request, with several seeds, and with which priority.

import { byId } from "./elements.js";

export const MAX_REQUESTS = 100;
const CONTROLS = [byId("per-line"), byId("seeds"), byId("priority")];
const [perLine, seeds, priority] = CONTROLS;
// The fields that the options are about.
const labels = { prompt: byId("per-line-label"), seed: byId("seeds-label") };

export function start(onChange) {
  for (const control of CONTROLS) control.addEventListener("input", onChange);
}

// Put the options next to their fields in this form.
export function place(fields) {
  for (const [name, label] of Object.entries(labels)) {
    label.remove();
    fields.get(name)?.node.append(label);
  }
}

export const read = () => ({
  isPromptPerLine: perLine.checked,
  numSeeds: Math.max(1, Math.trunc(seeds.value) || 1),
  priority: priority.value,
});

// Options that are missing, or that nobody can choose in the form, get their defaults.
export function write({ isPromptPerLine, numSeeds, priority: chosen }) {
  perLine.checked = isPromptPerLine === true;
  seeds.value = numSeeds >= 1 && numSeeds <= MAX_REQUESTS ? Math.trunc(numSeeds) : 1;
  priority.value = chosen === "low" ? "low" : "normal";
}

// Return the inputs of the requests. Each prompt gets the same seeds, which follow each other, so that the prompts can be
// compared. With one request the server chooses the seed if the form has none.
export function inputsOf(input, { isPromptPerLine, numSeeds }, hasSeed) {
  const lines = (input.prompt ?? "").split("\n").map((line) => line.trim()).filter(Boolean);
  const prompts = isPromptPerLine && lines.length ? lines : [input.prompt];
  const times = hasSeed ? numSeeds : 1;
  if (prompts.length * times > MAX_REQUESTS) {
    throw new Error(`These are ${prompts.length * times} requests. Send at most ${MAX_REQUESTS} at a time.`);
  }
  const base = input.seed ?? (times > 1 ? Math.floor(Math.random() * 2 ** 32) : undefined);
  return prompts.flatMap((prompt) => Array.from({ length: times }, (_, number) => ({
    ...input, ...(prompt !== undefined && { prompt }), ...(base !== undefined && { seed: base + number * (input.num_images ?? 1) }),
  })));
}
