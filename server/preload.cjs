// Brings fal's hosts to flux-server in a Node program: every TLS connection to one of them ends at the server's own
// TLS port instead. `flux-server run` loads this with NODE_OPTIONS, because Node's fetch ignores proxy variables.
"use strict";

const tls = require("node:tls");

const [port, ...names] = process.env.FLUX_TLS_DOOR.split(",");
const hosts = new Set(names);
const connect = tls.connect;

tls.connect = function (...given) {
  if (typeof given[0] !== "object") {
    const [number, host, ...rest] = given;
    const options = rest.find((value) => value && typeof value === "object");
    const listener = given.find((value) => typeof value === "function");
    given = [{ ...options, port: number, host: typeof host === "string" ? host : undefined }, listener];
  }
  const [options, ...rest] = given;
  const name = options.servername || options.host;
  if (!hosts.has(name)) return connect.call(this, options, ...rest);
  // A socket that is open already would still lead to the real host.
  const { socket, path, ...others } = options;
  return connect.call(this, { ...others, host: "127.0.0.1", port: Number(port), servername: name }, ...rest);
};
