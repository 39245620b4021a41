// subscribe with logs, by polling or streaming: the request takes a step for each update received.
import { fal, gatedInput, printResult, releaseStep } from "./sdk.mjs";

const updates = [];
let enqueued;
const result = await fal.subscribe("test/gate", {
  input: gatedInput,
  logs: true,
  mode: process.argv[3],
  pollInterval: 20,
  onEnqueue: (requestId) => {
    enqueued = requestId;
  },
  onQueueUpdate: (update) => {
    // As on the endpoint's page: logs must be a list in every update of a running request.
    const messages = update.status === "IN_QUEUE" ? [] : update.logs.map((log) => log.message);
    updates.push({ status: update.status, messages });
    if (update.status === "IN_PROGRESS") releaseStep();
  },
});
printResult({ enqueued, updates, result });
