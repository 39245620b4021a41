// Several requests from one form: each line of the prompt, with several seeds.

export const MAX_REQUESTS = 100;

// Return the inputs. Each prompt gets the same seeds, which follow each other, so that the prompts can be compared. With
// one request the server chooses the seed if the form has none.
export function inputsOf(input, { isPromptPerLine, numSeeds }) {
  const lines = (input.prompt ?? "").split("\n").map((line) => line.trim()).filter(Boolean);
  const prompts = isPromptPerLine && lines.length ? lines : [input.prompt];
  if (prompts.length * numSeeds > MAX_REQUESTS) {
    throw new Error(`These are ${prompts.length * numSeeds} requests. Send at most ${MAX_REQUESTS} at a time.`);
  }
  const base = input.seed ?? (numSeeds > 1 ? Math.floor(Math.random() * 2 ** 32) : undefined);
  return prompts.flatMap((prompt) => Array.from({ length: numSeeds }, (_, number) => ({
    ...input, ...(prompt !== undefined && { prompt }), ...(base !== undefined && { seed: base + number * (input.num_images ?? 1) }),
  })));
}
