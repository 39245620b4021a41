// Generates images with the clients that openapi-generator's typescript-fetch made, given the server's URL and a key.
import * as queueClient from "./queue";
import * as wholeClient from "./whole";

declare const process: { argv: string[] };
const [url, key] = process.argv.slice(2) as [string, string];
const whole = new wholeClient.Configuration({ basePath: url, apiKey: key });
const queue = new queueClient.DefaultApi(new queueClient.Configuration({ basePath: `${url}/queue`, apiKey: key }));
const endpoint = new wholeClient.FalAiFluxDevApi(whole);
const fluxDevInput: wholeClient.FluxDevInput & queueClient.FluxDevInput = {
  prompt: "a red apple",
  imageSize: { width: 64, height: 64 },
  numInferenceSteps: 1,
};
const pause = () => new Promise((resolve) => setTimeout(resolve, 50));

async function run(): Promise<string> {
  return (await endpoint.runFalAiFluxDev({ fluxDevInput })).images[0]!.url;
}

async function queueOfWhole(): Promise<[string[], string]> {
  const { requestId } = await endpoint.submitFalAiFluxDev({ fluxDevInput });
  const api = new wholeClient.QueueApi(whole);
  const place = { app: "fal-ai/flux/dev", requestId };
  let status = await api.queueStatus({ ...place, logs: true });
  while (status.status !== "COMPLETED") {
    await pause();
    status = await api.queueStatus({ ...place, logs: true });
  }
  const output = await api.queueResult(place);
  return [status.logs!.map((line) => line.message), output.images[0]!.url];
}

async function queueOfEndpoint(): Promise<[string[], string]> {
  const { requestId } = await queue.submit({ fluxDevInput });
  let status = await queue.getStatus({ requestId, logs: 1 });
  while (status.status !== "COMPLETED") {
    await pause();
    status = await queue.getStatus({ requestId, logs: 1 });
  }
  const output = await queue.getResult({ requestId });
  return [status.logs!.map((line) => line.message), output.images[0]!.url];
}

async function problem(): Promise<string | undefined> {
  try {
    await queue.getResult({ requestId: "unknown" });
  } catch (error) {
    if (error instanceof queueClient.ResponseError) {
      return queueClient.ProblemFromJSON(await error.response.json()).message;
    }
    throw error;
  }
  return undefined;
}

const printed = {
  run: await run(),
  whole: await queueOfWhole(),
  queue: await queueOfEndpoint(),
  problem: await problem(),
};
console.log(JSON.stringify(printed));
