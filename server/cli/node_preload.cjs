// Brings fal's hosts to flux-server in a Node program: every connection to a name under fal's domains ends at the
// server's own plain or TLS port instead, and no such name is looked up. `flux-server run` loads this with NODE_OPTIONS,
// because Node's fetch ignores proxy variables.
"use strict";

const net = require("node:net");
const tls = require("node:tls");
const { syncBuiltinESMExports } = require("node:module");

const [address, plainPort, tlsPort, ...domains] = process.env.FLUX_RUN_TARGET.split(",");
const connectSocket = net.Socket.prototype.connect;
const connectTls = tls.connect;

function isFal(name) {
  if (typeof name !== "string") return false;
  const host = name.toLowerCase().replace(/\.$/, "");
  return domains.some((domain) => host === domain || host.endsWith(`.${domain}`));
}

// connect takes (options), (path, options) or (port, host, options), each with a listener behind; Node itself passes on
// what it has made sense of as one array.
function optionsOf(given) {
  if (Array.isArray(given[0])) return optionsOf(given[0]);
  const options = { ...given.find((value) => value && typeof value === "object") };
  if (typeof given[0] === "object") return options;
  if (isNaN(given[0])) return { path: given[0], ...options };
  return { port: given[0], ...(typeof given[1] === "string" && { host: given[1] }), ...options };
}

const listenerOf = (given) => given.flat().find((value) => typeof value === "function");

// All ways to connect come through here, http and https, fetch and WebSocket alike.
net.Socket.prototype.connect = function (...given) {
  const options = optionsOf(given);
  if (options.path || !isFal(options.host)) return connectSocket.apply(this, given);
  const port = Number(this instanceof tls.TLSSocket ? tlsPort : plainPort);
  return connectSocket.call(this, { ...options, host: address, port, lookup: undefined }, listenerOf(given));
};

// The name that TLS is told, whatever the socket or path below is: those of the caller would still lead to fal.
tls.connect = function (...given) {
  const { socket, path, ...options } = optionsOf(given);
  const name = options.servername || options.host;
  if (!isFal(name)) return connectTls.apply(this, given);
  // A certificate bears no names of any depth; this server's always bears localhost.
  const checkServerIdentity = (_, certificate) => tls.checkServerIdentity("localhost", certificate);
  const here = { ...options, host: address, port: Number(tlsPort), servername: name, checkServerIdentity };
  return connectTls.call(this, here, listenerOf(given));
};

syncBuiltinESMExports();
