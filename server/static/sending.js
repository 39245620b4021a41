// How a form is sent: each line of the prompt as a request, with several seeds, and with which priority.

import { byId } from "./elements.js";

export const MAX_REQUESTS = 100;
const [perLine, seeds, priority] = [byId("per-line"), byId("seeds"), byId("priority")];
// The fields that the options are about.
const labels = { prompt: byId("per-line-label"), seed: byId("seeds-label") };

// Call `onChange` when the priority changes. The fields report the changes of the options that stand next to them.
export const start = (onChange) => priority.addEventListener("input", onChange);

// Put the options next to their fields in this form.
export function place(fields) {
  for (const [name, label] of Object.entries(labels)) {
    label.remove();
    fields.get(name)?.node.append(label);
  }
}

// Return the options. More seeds than can be sent stay, so that Run says so.
export const read = () => ({
  isPromptPerLine: perLine.checked,
  numSeeds: Math.max(1, Math.trunc(seeds.value) || 1),
  priority: priority.value,
});

// Set the options. Missing or invalid ones get their defaults.
export function write({ isPromptPerLine, numSeeds, priority: chosen }) {
  perLine.checked = isPromptPerLine === true;
  seeds.value = Number.isSafeInteger(numSeeds) && numSeeds >= 1 ? numSeeds : 1;
  priority.value = chosen === "low" ? "low" : "normal";
}

const promptsOf = (input, { isPromptPerLine }) => {
  const lines = (input.prompt ?? "").split("\n").map((line) => line.trim()).filter(Boolean);
  return isPromptPerLine && lines.length ? lines : [input.prompt];
};
const seedsPerPrompt = ({ numSeeds }, hasSeed) => (hasSeed ? numSeeds : 1);

// Return how many requests there are, and the prompt of the first.
export function summaryOf(input, options, hasSeed) {
  const prompts = promptsOf(input, options);
  return { number: prompts.length * seedsPerPrompt(options, hasSeed), prompt: prompts[0] };
}

// Return the inputs of the requests. Each prompt gets the same seeds, which follow each other, so that the prompts can be
// compared. With one seed per prompt, the server chooses it if the form has none.
export function inputsOf(input, options, hasSeed) {
  const { number: numRequests } = summaryOf(input, options, hasSeed);
  if (numRequests > MAX_REQUESTS) {
    throw new Error(`These are ${numRequests} requests. Send at most ${MAX_REQUESTS} at a time.`);
  }
  const seeds = seedsPerPrompt(options, hasSeed);
  const base = input.seed ?? (seeds > 1 ? Math.floor(Math.random() * 2 ** 32) : undefined);
  return promptsOf(input, options).flatMap((prompt) => Array.from({ length: seeds }, (_, number) => ({
    ...input, ...(prompt !== undefined && { prompt }), ...(base !== undefined && { seed: base + number * (input.num_images ?? 1) }),
  })));
}
