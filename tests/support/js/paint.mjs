// One picture by every way there is, and by every form it comes in; each is fetched.
import { fal, fetched, heard, say, soon } from "./sdk.mjs";

const endpoint = "fal-ai/flux/dev";
const enqueued = {};

async function subscribe(name, mode) {
  const onEnqueue = (requestId) => {
    enqueued[name] = requestId;
  };
  return fal.subscribe(endpoint, { input: soon, mode, pollInterval: 20, onEnqueue });
}

const results = {
  run: await fal.run(endpoint, { input: soon }),
  polling: await subscribe("polling", "polling"),
  streaming: await subscribe("streaming", "streaming"),
  syncMode: await fal.run(endpoint, { input: { ...soon, sync_mode: true } }),
  png: await fal.run(endpoint, { input: { ...soon, output_format: "png" } }),
  otherSeed: await fal.run(endpoint, { input: { ...soon, seed: 8 } }),
};
const { events, last } = await heard(await fal.stream(endpoint, { input: soon }));
const outputs = Object.entries(results).map(([name, result]) => [name, result.data ?? result]);
const pictures = {};
for (const [name, output] of [...outputs, ["stream", last]]) {
  pictures[name] = await fetched(output.images[0].url);
}
say({ results, enqueued, events, last, pictures });
