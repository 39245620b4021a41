// Every kind of client in Node, turned to each host that is named: what it was answered, or why it failed.
import http from "node:http";
import https from "node:https";

import { fetch as undiciFetch, request as undiciRequest } from "undici";
import WebSocket from "ws";

const requested = (module, url) =>
  new Promise((resolve, reject) => {
    const request = module.get(url, (response) => {
      let text = "";
      response.on("data", (chunk) => (text += chunk)).on("end", () => resolve({ status: response.statusCode, text }));
    });
    request.once("error", reject);
  });

const fetched = async (fetching, url) => {
  const response = await fetching(url);
  return { status: response.status, text: await response.text() };
};

const opened = (url) =>
  new Promise((resolve, reject) => {
    const socket = new WebSocket(url);
    socket.once("unexpected-response", (_, response) => resolve({ status: response.statusCode, text: "" }));
    socket.once("open", () => (socket.close(), resolve({ status: 101, text: "" })));
    socket.once("error", reject);
  });

const ways = {
  fetch: (host) => fetched(fetch, `https://${host}/made/up`),
  "fetch, plain": (host) => fetched(fetch, `http://${host}/made/up`),
  "undici fetch": (host) => fetched(undiciFetch, `https://${host}/made/up`),
  "undici request": async (host) => {
    const { statusCode, body } = await undiciRequest(`https://${host}/made/up`);
    return { status: statusCode, text: await body.text() };
  },
  "http.request": (host) => requested(http, `http://${host}/made/up`),
  "https.request": (host) => requested(https, `https://${host}/made/up`),
  WebSocket: (host) => opened(`wss://${host}/made/up`),
  "WebSocket, plain": (host) => opened(`ws://${host}/made/up`),
};

const said = {};
for (const host of process.argv.slice(2)) {
  for (const [name, way] of Object.entries(ways)) {
    said[`${name}: ${host}`] = await way(host).catch((error) => ({ failed: String(error.cause ?? error) }));
  }
}
console.log(JSON.stringify(said));
process.exit(0);
