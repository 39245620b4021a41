// A preload script that redirects a Node program's connections from fal's hosts to flux-server's plain or TLS port,
// without looking up fal's names. `flux-server run` loads it with NODE_OPTIONS, because Node's fetch ignores proxy
// variables.
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

// connect takes (options), (path, options) or (port, host, options), each followed by an optional listener. Node itself
// passes its normalized arguments as one array.
function optionsOf(args) {
  if (Array.isArray(args[0])) return optionsOf(args[0]);
  const options = { ...args.find((value) => value && typeof value === "object") };
  if (typeof args[0] === "object") return options;
  if (isNaN(args[0])) return { path: args[0], ...options };
  return { port: args[0], ...(typeof args[1] === "string" && { host: args[1] }), ...options };
}

const listenerOf = (args) => args.flat().find((value) => typeof value === "function");

// All connections use this method: http and https, fetch and WebSocket.
net.Socket.prototype.connect = function (...args) {
  const options = optionsOf(args);
  if (options.path || !isFal(options.host)) return connectSocket.apply(this, args);
  const port = Number(this instanceof tls.TLSSocket ? tlsPort : plainPort);
  return connectSocket.call(this, { ...options, host: address, port, lookup: undefined }, listenerOf(args));
};

// The TLS server name decides whether a connection is redirected. A socket or path from the caller is dropped,
// because it would still lead to fal.
tls.connect = function (...args) {
  const { socket, path, ...options } = optionsOf(args);
  const name = options.servername || options.host;
  if (!isFal(name)) return connectTls.apply(this, args);
  // A wildcard in a certificate covers one level of subdomains only, but fal's names may be deeper. This server's
  // certificate always includes localhost, so check that name.
  const checkServerIdentity = (_, certificate) => tls.checkServerIdentity("localhost", certificate);
  const here = { ...options, host: address, port: Number(tlsPort), servername: name, checkServerIdentity };
  return connectTls.call(this, here, listenerOf(args));
};

syncBuiltinESMExports();
