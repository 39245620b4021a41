// The settings of each endpoint's form, kept in this browser, and links that hold them.

import { withoutData } from "./labels.js";

const KEY = "settings";

const load = () => JSON.parse(localStorage.getItem(KEY) ?? "{}");

// Return the input that the endpoint's form had last; undefined if it was never changed.
export const settingsOf = (endpoint) => load()[endpoint];

export function remember(endpoint, input) {
  try {
    localStorage.setItem(KEY, JSON.stringify({ ...load(), [endpoint]: input }, withoutData));
  } catch {
    // The storage is full: the form works without being remembered.
  }
}

export function forget(endpoint) {
  const { [endpoint]: _, ...others } = load();
  localStorage.setItem(KEY, JSON.stringify(others));
}

// The part of a link behind "#". Browsers do not send it to the server.
export const toFragment = (endpoint, input) => `#${endpoint}?${encodeURIComponent(JSON.stringify(input, withoutData))}`;

// Return the endpoint and the input of a link; null if it holds none.
export function fromFragment(fragment) {
  const match = /^#([\w./-]+)\?(.+)$/.exec(fragment);
  if (!match) return null;
  try {
    const input = JSON.parse(decodeURIComponent(match[2]));
    return typeof input === "object" && input !== null && !Array.isArray(input) ? { endpoint: match[1], input } : null;
  } catch {
    return null;
  }
}
