// The images that the user marked as favourites, kept in this browser with the requests that they belong to.

import { withoutData } from "./labels.js";

const KEY = "favourites";

// { requestId: { endpoint, requestId, input, startedAt, images: [index, ...] } }
const load = () => JSON.parse(localStorage.getItem(KEY) ?? "{}");

export const requests = () => Object.values(load()).sort((a, b) => b.startedAt - a.startedAt);
export const has = (requestId, index) => load()[requestId]?.images.includes(index) ?? false;

// Mark an image, or remove its mark. Returns whether it is marked now. Throws an error if the browser's storage is full.
export function toggle(request, index) {
  const all = load();
  const images = all[request.requestId]?.images ?? [];
  const isMarked = !images.includes(index);
  const left = isMarked ? [...images, index] : images.filter((each) => each !== index);
  if (left.length) all[request.requestId] = { ...request, images: left };
  else delete all[request.requestId];
  localStorage.setItem(KEY, JSON.stringify(all, withoutData));
  return isMarked;
}

export function remove(requestId) {
  const all = load();
  delete all[requestId];
  localStorage.setItem(KEY, JSON.stringify(all));
}
