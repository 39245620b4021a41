// Requests that the server cannot serve, with each kind of call.
import { failureOf, fal, instantInput, printResult } from "./sdk.mjs";

const input = { prompt: "an apple", num_inference_steps: 51, image_size: "huge" };
const endpoint = "fal-ai/flux/dev";
const unknown = { requestId: crypto.randomUUID() };
printResult({
  invalid: {
    run: await failureOf(fal.run(endpoint, { input })),
    submit: await failureOf(fal.queue.submit(endpoint, { input })),
    subscribe: await failureOf(fal.subscribe(endpoint, { input })),
    stream: await failureOf(fal.stream(endpoint, { input }).then((stream) => stream.done())),
  },
  missing: await failureOf(fal.run(endpoint, { input: { seed: 1 } })),
  failed: await failureOf(
    fal.subscribe("test/raises", { input: { ...instantInput, prompt: "told" }, pollInterval: 20 }),
  ),
  failedStream: await failureOf(fal.stream("test/raises", { input: instantInput }).then((stream) => stream.done())),
  noSuchRequest: await failureOf(fal.queue.status(endpoint, unknown)),
  noSuchEndpoint: await failureOf(fal.queue.submit("fal-ai/flux/nowhere", { input: instantInput })),
});
