// The output of each endpoint in a JSON file of inputs; endpoints that end in /stream are streamed too.
import { readFileSync } from "node:fs";

import { collectEvents, fal, failureOf, printResult } from "./sdk.mjs";

const inputs = JSON.parse(readFileSync(process.argv[2], "utf8"));
const outputs = {};

async function call(endpoint, input) {
  outputs[endpoint] = { subscribe: (await fal.subscribe(endpoint, { input, pollInterval: 20 })).data };
  if (endpoint.endsWith("/stream")) {
    outputs[endpoint].stream = (await collectEvents(await fal.stream(endpoint, { input }))).last;
  }
}

for (const [endpoint, input] of Object.entries(inputs)) {
  const failure = await failureOf(call(endpoint, input));
  if (failure) outputs[endpoint] = { failure };
}
printResult(outputs);
