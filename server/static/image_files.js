// Images as files: download, copy to the clipboard, and drag to a field.

// The type under which a dragged result carries its URL.
const DRAGGED = "application/x-flux-server-image";

export const setDragged = (transfer, url) => transfer.setData(DRAGGED, url);

// What was dropped: { url } for a result or a link, { file } for a file, {} for anything else.
export function dropped(transfer) {
  const url = transfer.getData(DRAGGED);
  if (url) return { url };
  if (transfer.files[0]) return { file: transfer.files[0] };
  const link = transfer.getData("text/uri-list").split("\n").find((line) => line && !line.startsWith("#"));
  return link ? { url: link.trim() } : {};
}

// Load an image of this server, or one given as a data URI.
export async function load(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

export const toPng = (canvas) => new Promise((resolve, reject) => {
  canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The image is too large for this browser."))), "image/png");
});

async function asPng(url) {
  const image = await load(url);
  const canvas = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight });
  canvas.getContext("2d").drawImage(image, 0, 0);
  return toPng(canvas);
}

// Copy an image so that it can be pasted into other programs. Browsers accept PNG only.
export async function copy(url) {
  if (!navigator.clipboard?.write) throw new Error("Browsers copy images only from pages on HTTPS or on localhost.");
  await navigator.clipboard.write([new ClipboardItem({ "image/png": asPng(url) })]);
}

export async function copyText(text) {
  if (!navigator.clipboard) throw new Error("Browsers copy text only from pages on HTTPS or on localhost.");
  await navigator.clipboard.writeText(text);
}

// The name under which a result is downloaded: its prompt and seed, then the file's extension.
export function fileName(prompt, seed, url) {
  const extension = /^data:image\/(\w+)|\.(\w+)$/.exec(url);
  const words = (prompt ?? "").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 50);
  return `${words || "image"}-${seed}.${(extension?.[1] ?? extension?.[2] ?? "png").replace("jpeg", "jpg")}`;
}
