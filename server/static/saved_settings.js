// The settings of each endpoint's form, { input, options }, kept in this browser or in a link. The options are those of
// sending.js.

import { withoutData } from "./labels.js";

const KEY = "forms";
// Earlier versions kept inputs without options here.
localStorage.removeItem("settings");

const load = () => JSON.parse(localStorage.getItem(KEY) ?? "{}");

// Return the settings that the endpoint's form had last; undefined if they were never changed.
export const settingsOf = (endpoint) => load()[endpoint];

export function remember(endpoint, settings) {
  try {
    localStorage.setItem(KEY, JSON.stringify({ ...load(), [endpoint]: settings }, withoutData));
  } catch {
    // The storage is full: the form works without being remembered.
  }
}

export function forget(endpoint) {
  const { [endpoint]: _, ...others } = load();
  localStorage.setItem(KEY, JSON.stringify(others));
}

// The part of a link behind "#": the endpoint, "?", the input, "&", the options. Browsers do not send it to the server.
export const toFragment = (endpoint, { input, options }) =>
  `#${endpoint}?${[input, options].map((part) => encodeURIComponent(JSON.stringify(part, withoutData))).join("&")}`;

// Return { endpoint, input, options } of a link; null if it holds none.
export function fromFragment(fragment) {
  const match = /^#([\w./-]+)\?([^&]+)(?:&([^&]+))?$/.exec(fragment);
  if (!match) return null;
  try {
    const [input, options] = [match[2], match[3] ?? "{}"].map((part) => JSON.parse(decodeURIComponent(part)));
    return isObject(input) && isObject(options) ? { endpoint: match[1], input, options } : null;
  } catch {
    return null;
  }
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
