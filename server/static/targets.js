// The endpoints and fields that an image can be sent to. The server lists them in `config.image_inputs`:
// { endpoint: ["image_url", "mask_url", "control_loras.control_image_url", ...] }.

// The endpoint with which FLUX.1 [dev] repaints, as for edits with OpenAI's API.
const USUAL_INPAINTING = "fal-ai/flux-lora/inpainting";

const takes = (config, endpoint, ...paths) => paths.every((path) => config.image_inputs[endpoint]?.includes(path));

// The candidate that is a variant of the endpoint, or the first candidate; undefined if there is none.
function variantOf(endpoint, candidates) {
  const base = endpoint.replace(/\/(image-to-image|inpaint|inpainting|redux)$/, "");
  return candidates.find((name) => name.startsWith(`${base}/`)) ?? candidates[0];
}

export const imageToImageFor = (config, endpoint) => variantOf(endpoint, config.image_to_image);

export function inpaintingFor(config, endpoint) {
  const candidates = config.endpoints.filter((name) => takes(config, name, "image_url", "mask_url"));
  if (candidates.includes(USUAL_INPAINTING)) candidates.unshift(USUAL_INPAINTING);
  return candidates.includes(endpoint) ? endpoint : variantOf(endpoint, candidates);
}

// Every image input as { endpoint, path }.
export const all = (config) =>
  Object.entries(config.image_inputs).flatMap(([endpoint, paths]) => paths.map((path) => ({ endpoint, path })));
