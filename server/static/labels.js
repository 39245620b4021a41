// Names of fields and sizes, as the page shows them.

// Turn a property's name into a label: num_images -> Number of images, image_url -> Image URL.
export function labelOf(name) {
  const words = name.replaceAll("_", " ").replace(/^num /, "number of ").replace(/\burl\b/, "URL").replace(/^loras$/, "LoRAs");
  return words[0].toUpperCase() + words.slice(1);
}

// fal's names of sizes, in pixels.
export const PRESETS = {
  square_hd: [1024, 1024], square: [512, 512], portrait_4_3: [768, 1024],
  portrait_16_9: [576, 1024], landscape_4_3: [1024, 768], landscape_16_9: [1024, 576],
};

// The width and height of a size in pixels; undefined if there is none.
export const sidesOf = (size) => PRESETS[size] ?? [size?.width, size?.height];

// A size as text, such as 1024x768; null if there is none.
export function sizeText(size) {
  const [width, height] = sidesOf(size);
  return width ? `${width}x${height}` : null;
}

// For JSON.stringify: leave out files given as data URIs, because they are too large for the browser's storage and links.
export const withoutData = (_, value) => (typeof value === "string" && value.startsWith("data:") ? undefined : value);
