// Generates images with openapi-fetch and the types that openapi-typescript made, given the server's URL and a key.
import createClient from "openapi-fetch";
import type { paths as QueuePaths } from "./queue";
import type { paths as WholePaths } from "./whole";

declare const process: { argv: string[] };
const [url, key] = process.argv.slice(2) as [string, string];
const headers = { Authorization: key };
const whole = createClient<WholePaths>({ baseUrl: url, headers });
const queue = createClient<QueuePaths>({ baseUrl: `${url}/queue`, headers });
const body = { prompt: "a red apple", image_size: { width: 64, height: 64 }, num_inference_steps: 1 };
const pause = () => new Promise((resolve) => setTimeout(resolve, 50));

async function run(): Promise<string> {
  const { data, error } = await whole.POST("/fal-ai/flux/dev", { body });
  if (error) throw new Error(error.message);
  return data.images[0]!.url;
}

async function queueOfWhole(): Promise<[string[], string]> {
  const submitted = await whole.POST("/queue/fal-ai/flux/dev", { body });
  if (submitted.error) throw new Error(submitted.error.message);
  const path = { app: "fal-ai/flux/dev", request_id: submitted.data.request_id };
  for (;;) {
    const { data } = await whole.GET("/queue/{app}/requests/{request_id}/status", {
      params: { path, query: { logs: true } },
    });
    if (data?.status === "COMPLETED") {
      const output = await whole.GET("/queue/{app}/requests/{request_id}", { params: { path } });
      return [data.logs!.map((line) => line.message), output.data!.images[0]!.url];
    }
    await pause();
  }
}

async function queueOfEndpoint(): Promise<[string[], string]> {
  const submitted = await queue.POST("/fal-ai/flux/dev", { body });
  const path = { request_id: submitted.data!.request_id };
  for (;;) {
    const { data } = await queue.GET("/fal-ai/flux/dev/requests/{request_id}/status", {
      params: { path, query: { logs: 1 } },
    });
    if (data?.status === "COMPLETED") {
      const output = await queue.GET("/fal-ai/flux/dev/requests/{request_id}", { params: { path } });
      return [data.logs!.map((line) => line.message), output.data!.images[0]!.url];
    }
    await pause();
  }
}

async function problem(): Promise<string | undefined> {
  const path = { request_id: "unknown" };
  const { error } = await queue.GET("/fal-ai/flux/dev/requests/{request_id}", { params: { path } });
  return error?.message;
}

const printed = {
  run: await run(),
  whole: await queueOfWhole(),
  queue: await queueOfEndpoint(),
  problem: await problem(),
};
console.log(JSON.stringify(printed));
