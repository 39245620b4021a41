// Brings fal's hosts to flux-server in a Node program: every TLS connection to one of them ends at the server's own
// TLS port instead. `flux-server run` loads this with NODE_OPTIONS, because Node's fetch ignores proxy variables.
"use strict";

const tls = require("node:tls");

const [address, port, ...names] = process.env.FLUX_TLS_DOOR.split(",");
const hosts = new Set(names);
const connect = tls.connect;

// tls.connect takes (options), (path, options) or (port, host, options), each with a listener behind.
function optionsOf(given) {
  const options = { ...given.find((value) => value && typeof value === "object") };
  if (typeof given[0] === "object") return options;
  if (isNaN(given[0])) return { path: given[0], ...options };
  return { port: given[0], ...(typeof given[1] === "string" && { host: given[1] }), ...options };
}

tls.connect = function (...given) {
  const { socket, path, ...options } = optionsOf(given);
  const name = options.servername || options.host;
  if (!hosts.has(name)) return connect.apply(this, given);
  // Without the socket or path of the caller, which would still lead to the real host.
  const here = { ...options, host: address, port: Number(port), servername: name };
  return connect.call(this, here, given.find((value) => typeof value === "function"));
};
