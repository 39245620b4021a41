// The same image from each kind of call and in each output format; each file is fetched.
import { collectEvents, fal, fastInput, fetchImage, printResult } from "./sdk.mjs";

const endpoint = "fal-ai/flux/dev";
const enqueued = {};

async function subscribe(name, mode) {
  const onEnqueue = (requestId) => {
    enqueued[name] = requestId;
  };
  return fal.subscribe(endpoint, { input: fastInput, mode, pollInterval: 20, onEnqueue });
}

const results = {
  run: await fal.run(endpoint, { input: fastInput }),
  polling: await subscribe("polling", "polling"),
  streaming: await subscribe("streaming", "streaming"),
  syncMode: await fal.run(endpoint, { input: { ...fastInput, sync_mode: true } }),
  png: await fal.run(endpoint, { input: { ...fastInput, output_format: "png" } }),
  otherSeed: await fal.run(endpoint, { input: { ...fastInput, seed: 8 } }),
};
const { events, last } = await collectEvents(await fal.stream(endpoint, { input: fastInput }));
const outputs = Object.entries(results).map(([name, result]) => [name, result.data ?? result]);
const images = {};
for (const [name, output] of [...outputs, ["stream", last]]) {
  images[name] = await fetchImage(output.images[0].url);
}
printResult({ results, enqueued, events, last, pictures: images });
