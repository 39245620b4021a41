// fal.stream: one progress event for each step, then the output.
import { fal, gated, heard, say, step } from "./sdk.mjs";

const stream = await fal.stream("test/gate", { input: gated });
// Nothing is told before the first step.
step();
const { events, iterated, last } = await heard(stream, step);
say({ events, iterated, last, requestId: stream.requestId });
