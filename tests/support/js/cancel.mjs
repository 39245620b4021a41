// cancel: for a running request, a waiting one, a finished one, and one that does not exist.
import { failureOf, fal, gatedInput, instantInput, printResult, releaseStep, waitForState, waitUntil } from "./sdk.mjs";

async function submit(endpoint, input) {
  const { request_id: requestId } = await fal.queue.submit(endpoint, { input });
  return { requestId };
}

const running = await submit("test/gate", gatedInput);
await waitForState("test/gate", running.requestId, "IN_PROGRESS");
const waiting = await submit("test/null", instantInput);
const behind = await submit("test/null", instantInput);
const stream = await fal.queue.streamStatus("test/null", behind);
const updates = [];
stream.on("data", (update) => updates.push(update));
await waitUntil(() => updates.length > 0);

await fal.queue.cancel("test/null", waiting);
await waitUntil(() => updates.length > 1);
await fal.queue.cancel("test/gate", running);
releaseStep();
printResult({
  waiting: await waitForState("test/null", waiting.requestId, "COMPLETED"),
  waitingResult: await failureOf(fal.queue.result("test/null", waiting)),
  running: await waitForState("test/gate", running.requestId, "COMPLETED"),
  runningResult: await failureOf(fal.queue.result("test/gate", running)),
  behind: await stream.done(),
  updates,
  late: await failureOf(fal.queue.cancel("test/null", behind)),
  unknown: await failureOf(fal.queue.cancel("test/null", { requestId: crypto.randomUUID() })),
});
