// submit, status, streamStatus and result of one request, which takes a step for each event heard.
import { fal, failureOf, gated, heard, say, step, untilState } from "./sdk.mjs";

const submitted = await fal.queue.submit("test/gate", { input: gated });
const requestId = submitted.request_id;
const running = await untilState("test/gate", requestId, "IN_PROGRESS");
const early = await failureOf(fal.queue.result("test/gate", { requestId }));
const { events, last } = await heard(await fal.queue.streamStatus("test/gate", { requestId, logs: true }), step);
const completed = await fal.queue.status("test/gate", { requestId, logs: true });
const quiet = await fal.queue.status("test/gate", { requestId });
const result = await fal.queue.result("test/gate", { requestId });
say({ submitted, running, early, events, last, completed, quiet, result });
