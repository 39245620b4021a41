// Requests to each host given as an argument, by each Node HTTP client; prints each response or error as JSON.
import http from "node:http";
import https from "node:https";

import { fetch as undiciFetch, request as undiciRequest } from "undici";
import WebSocket from "ws";

const getWith = (module, url) =>
  new Promise((resolve, reject) => {
    const request = module.get(url, (response) => {
      let text = "";
      response.on("data", (chunk) => (text += chunk)).on("end", () => resolve({ status: response.statusCode, text }));
    });
    request.once("error", reject);
  });

const fetchWith = async (fetchFunction, url) => {
  const response = await fetchFunction(url);
  return { status: response.status, text: await response.text() };
};

const openWebSocket = (url) =>
  new Promise((resolve, reject) => {
    const socket = new WebSocket(url);
    socket.once("unexpected-response", (_, response) => resolve({ status: response.statusCode, text: "" }));
    socket.once("open", () => (socket.close(), resolve({ status: 101, text: "" })));
    socket.once("error", reject);
  });

const clients = {
  fetch: (host) => fetchWith(fetch, `https://${host}/made/up`),
  "fetch, plain": (host) => fetchWith(fetch, `http://${host}/made/up`),
  "undici fetch": (host) => fetchWith(undiciFetch, `https://${host}/made/up`),
  "undici request": async (host) => {
    const { statusCode, body } = await undiciRequest(`https://${host}/made/up`);
    return { status: statusCode, text: await body.text() };
  },
  "http.request": (host) => getWith(http, `http://${host}/made/up`),
  "https.request": (host) => getWith(https, `https://${host}/made/up`),
  WebSocket: (host) => openWebSocket(`wss://${host}/made/up`),
  "WebSocket, plain": (host) => openWebSocket(`ws://${host}/made/up`),
};

const results = {};
for (const host of process.argv.slice(2)) {
  for (const [name, send] of Object.entries(clients)) {
    results[`${name}: ${host}`] = await send(host).catch((error) => ({ failed: String(error.cause ?? error) }));
  }
}
console.log(JSON.stringify(results));
process.exit(0);
