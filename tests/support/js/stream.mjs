// fal.stream: one progress event for each step, then the output.
import { collectEvents, fal, gatedInput, printResult, releaseStep } from "./sdk.mjs";

const stream = await fal.stream("test/gate", { input: gatedInput });
// No event arrives before the first step.
releaseStep();
const { events, iterated, last } = await collectEvents(stream, releaseStep);
printResult({ events, iterated, last, requestId: stream.requestId });
