// cancel: a request that runs, one that waits behind it, and one that is done.
import { atOnce, fal, failureOf, gated, heard, say, step, until, untilState } from "./sdk.mjs";

async function submit(endpoint, input) {
  const { request_id: requestId } = await fal.queue.submit(endpoint, { input });
  return { requestId };
}

const running = await submit("test/gate", gated);
await untilState("test/gate", running.requestId, "IN_PROGRESS");
const waiting = await submit("test/null", atOnce);
const behind = await submit("test/null", atOnce);
const stream = await fal.queue.streamStatus("test/null", behind);
const updates = [];
stream.on("data", (update) => updates.push(update));
await until(() => updates.length > 0);

await fal.queue.cancel("test/null", waiting);
await until(() => updates.length > 1);
await fal.queue.cancel("test/gate", running);
step();
say({
  waiting: await untilState("test/null", waiting.requestId, "COMPLETED"),
  waitingResult: await failureOf(fal.queue.result("test/null", waiting)),
  running: await untilState("test/gate", running.requestId, "COMPLETED"),
  runningResult: await failureOf(fal.queue.result("test/gate", running)),
  behind: await stream.done(),
  updates,
  late: await failureOf(fal.queue.cancel("test/null", behind)),
  unknown: await failureOf(fal.queue.cancel("test/null", { requestId: crypto.randomUUID() })),
});
