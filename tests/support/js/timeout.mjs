// subscribe's timeout, while the request waits behind one that does not end by itself.
import { atOnce, fal, failureOf, gated, say, step, untilState } from "./sdk.mjs";

// In mode "streaming" the SDKs throw from a timer, where nobody can catch it.
const thrown = [];
process.on("uncaughtException", (error) => thrown.push(error.message));

const { request_id } = await fal.queue.submit("test/gate", { input: gated });
await untilState("test/gate", request_id, "IN_PROGRESS");
let requestId;
const failure = await failureOf(
  fal.subscribe("test/null", {
    input: atOnce,
    mode: process.argv[3],
    timeout: 100,
    onEnqueue: (id) => {
      requestId = id;
    },
  }),
);
const timedOut = await untilState("test/null", requestId, "COMPLETED");
for (let count = 0; count < gated.num_inference_steps; count++) step();
await untilState("test/gate", request_id, "COMPLETED");
say({ failure, thrown, timedOut });
