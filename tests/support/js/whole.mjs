// A program as its user wrote it: the SDK named in $SDK, credentials, and nothing that points it anywhere.
import { readFileSync } from "node:fs";

import WebSocket from "ws";

const sdk = await import(process.env.SDK);
const fal = sdk.fal ?? sdk;
fal.config({ credentials: process.env.FAL_KEY });
// A stream that fails says so twice, the second time to nobody.
process.on("unhandledRejection", () => {});
// Node has one of its own since version 22.
globalThis.WebSocket ??= WebSocket;

const endpoint = "fal-ai/flux/dev";
const input = { prompt: "a red apple", seed: 7, num_inference_steps: 2, image_size: { width: 64, height: 64 } };
const output = (result) => result.data ?? result;

async function streamed() {
  const stream = await fal.stream(endpoint, { input });
  for await (const event of stream) void event;
  return stream.done();
}

async function queued() {
  const { request_id: requestId } = await fal.queue.submit(endpoint, { input });
  for await (const event of await fal.queue.streamStatus(endpoint, { requestId })) void event;
  return output(await fal.queue.result(endpoint, { requestId }));
}

const realtime = () =>
  new Promise((resolve, reject) => {
    const connection = fal.realtime.connect(endpoint, {
      onResult: (result) => {
        connection.close();
        resolve(result);
      },
      onError: reject,
    });
    // The SDK keeps it to itself when there is no token to be had: then there is nothing left to wait for.
    process.once("beforeExit", () => reject(new Error("no answer")));
    connection.send(input);
  });

const ways = {
  run: async () => output(await fal.run(endpoint, { input })),
  subscribe: async () => output(await fal.subscribe(endpoint, { input })),
  queued,
  streamed,
  upload: () => fal.storage.upload(new File([readFileSync(process.argv[2])], "small.png", { type: "image/png" })),
  realtime,
};

const said = {};
for (const [name, way] of Object.entries(ways)) {
  try {
    said[name] = await way();
  } catch (error) {
    said[name] = { failed: String(error) };
  }
}
console.log(JSON.stringify(said));
process.exit(0);
