// submit, status, streamStatus and result of one request, which takes a step for each event received.
import { collectEvents, failureOf, fal, gatedInput, printResult, releaseStep, waitForState } from "./sdk.mjs";

const submitted = await fal.queue.submit("test/gate", { input: gatedInput });
const requestId = submitted.request_id;
const running = await waitForState("test/gate", requestId, "IN_PROGRESS");
const early = await failureOf(fal.queue.result("test/gate", { requestId }));
const stream = await fal.queue.streamStatus("test/gate", { requestId, logs: true });
const { events, last } = await collectEvents(stream, releaseStep);
const completed = await fal.queue.status("test/gate", { requestId, logs: true });
const quiet = await fal.queue.status("test/gate", { requestId });
const result = await fal.queue.result("test/gate", { requestId });
printResult({ submitted, running, early, events, last, completed, quiet, result });
