// subscribe's timeout, while the request waits behind one that does not end on its own.
import { failureOf, fal, gatedInput, instantInput, printResult, releaseStep, waitForState } from "./sdk.mjs";

// In mode "streaming" the SDKs throw from a timer, where the caller cannot catch the error.
const thrown = [];
process.on("uncaughtException", (error) => thrown.push(error.message));

const { request_id } = await fal.queue.submit("test/gate", { input: gatedInput });
await waitForState("test/gate", request_id, "IN_PROGRESS");
let requestId;
const failure = await failureOf(
  fal.subscribe("test/null", {
    input: instantInput,
    mode: process.argv[3],
    timeout: 100,
    onEnqueue: (id) => {
      requestId = id;
    },
  }),
);
const timedOut = await waitForState("test/null", requestId, "COMPLETED");
for (let count = 0; count < gatedInput.num_inference_steps; count++) releaseStep();
await waitForState("test/gate", request_id, "COMPLETED");
printResult({ failure, thrown, timedOut });
