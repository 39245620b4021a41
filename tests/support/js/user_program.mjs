// A program as a user writes it: the SDK named in $SDK, credentials, and no configuration of the server.
import { readFileSync } from "node:fs";

import WebSocket from "ws";

const sdk = await import(process.env.SDK);
const fal = sdk.fal ?? sdk;
fal.config({ credentials: process.env.FAL_KEY });
// A stream that fails reports its error twice, the second time as a rejection that no caller can handle.
process.on("unhandledRejection", () => {});
// Node has a built-in WebSocket since version 22.
globalThis.WebSocket ??= WebSocket;

const endpoint = "fal-ai/flux/dev";
const input = { prompt: "a red apple", seed: 7, num_inference_steps: 2, image_size: { width: 64, height: 64 } };
const output = (result) => result.data ?? result;

async function generateStream() {
  const stream = await fal.stream(endpoint, { input });
  for await (const event of stream) void event;
  return stream.done();
}

async function generateQueued() {
  const { request_id: requestId } = await fal.queue.submit(endpoint, { input });
  for await (const event of await fal.queue.streamStatus(endpoint, { requestId })) void event;
  return output(await fal.queue.result(endpoint, { requestId }));
}

const generateRealtime = () =>
  new Promise((resolve, reject) => {
    const connection = fal.realtime.connect(endpoint, {
      onResult: (result) => {
        connection.close();
        resolve(result);
      },
      onError: reject,
    });
    // The SDK reports no error if it gets no token. Node then has nothing left to wait for and is about to exit.
    process.once("beforeExit", () => reject(new Error("no answer")));
    connection.send(input);
  });

const calls = {
  run: async () => output(await fal.run(endpoint, { input })),
  subscribe: async () => output(await fal.subscribe(endpoint, { input })),
  queued: generateQueued,
  streamed: generateStream,
  upload: () => fal.storage.upload(new File([readFileSync(process.argv[2])], "small.png", { type: "image/png" })),
  realtime: generateRealtime,
};

const results = {};
for (const [name, call] of Object.entries(calls)) {
  try {
    results[name] = await call();
  } catch (error) {
    results[name] = { failed: String(error) };
  }
}
console.log(JSON.stringify(results));
process.exit(0);
