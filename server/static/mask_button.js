// The button of a mask's field: it opens the brush over the form's image and uploads the mask.

import { localUrl } from "./api.js";
import { button } from "./elements.js";

// `imageField()` returns the form's field for the image. The field's new function draw() returns whether it has a new mask.
export const maskButton = (imageField) => (field) => {
  field.draw = () => draw(field, imageField());
  return button("Draw mask", field.draw);
};

async function draw(field, imageField) {
  await imageField?.settled();
  const url = localUrl(imageField?.read() ?? "");
  field.showProblem("");
  const fail = (message) => {
    field.showProblem(message);
    return false;
  };
  if (!url) return fail("Choose the image first: the mask is drawn over it.");
  if (!isReadable(url)) return fail("A mask can only be drawn over an image on this server. Upload the image, then draw.");
  const { drawMask } = await import("./mask.js");
  try {
    const earlier = field.read();
    const file = await drawMask(url, earlier && isReadable(localUrl(earlier)) ? localUrl(earlier) : null);
    return file !== null && (await field.upload(file));
  } catch {
    return fail("The image cannot be read. It may no longer be stored on this server.");
  }
}

// The page's content security policy lets scripts read only images of this origin, and those given as data URIs.
const isReadable = (url) => url.startsWith("data:image/") || url.startsWith(`${location.origin}/`);
