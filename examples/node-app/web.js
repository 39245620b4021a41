// The address to which fal sends finished stickers.
import { createServer } from "node:http";
import { deliver } from "./stickers.js";

// The request id of each webhook that came.
export const received = [];

// A server whose POST / takes a webhook of fal.
export const server = createServer(async (request, response) => {
  const parts = [];
  for await (const part of request) parts.push(part);
  const { request_id: requestId, payload } = JSON.parse(Buffer.concat(parts));
  deliver(requestId, payload);
  received.push(requestId);
  response.end();
});
