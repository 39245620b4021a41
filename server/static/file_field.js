// A form's field for a file: a URL that is typed or pasted, or a file that is dropped, pasted or chosen, then uploaded.

import { isOwnFile, localUrl, upload } from "./api.js";
import { withKey } from "./api_key.js";
import { button, element } from "./elements.js";
import { dropped } from "./image_files.js";

const isImage = (url) => url.startsWith("data:image/") || isOwnFile(url);

// `frame` adds the label and the messages. `tools` are more buttons of the field: functions of the field.
export function fileField(name, property, frame, tools = []) {
  const control = element("input", { type: "text", placeholder: "https://… or drop a file here" });
  const picker = element("input", { type: "file", hidden: true });
  const preview = element("img", { alt: "", hidden: true });
  const uploading = element("span", { className: "uploading" });
  uploading.setAttribute("role", "status");
  const row = element("span", { className: "row" }, button("Choose file", () => picker.click()), picker, preview, uploading);
  const field = { ...frame(name, property, control, row), read: () => control.value || undefined };
  field.change = (url) => {
    control.value = url;
    control.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const showPreview = () => {
    field.forgetUpload();
    preview.hidden = !isImage(control.value);
    if (!preview.hidden) preview.src = localUrl(control.value);
  };
  field.write = (value) => {
    control.value = value ?? "";
    showPreview();
  };
  addUpload(field, uploading);
  field.drop = (transfer) => {
    const { url, file } = dropped(transfer);
    if (file) field.upload(file);
    else if (url) field.change(url);
  };
  listen(field, control, picker);
  control.addEventListener("input", showPreview);
  row.append(...tools.map((tool) => tool(field)));
  return field;
}

// Add upload(file), and settled(), which resolves when no upload runs: to true, or to false if the last one failed.
function addUpload(field, uploading) {
  let latest;
  field.forgetUpload = () => (latest = Promise.resolve(true));
  field.settled = () => latest;
  field.upload = (file) => (latest = uploadFile(file));
  field.forgetUpload();

  async function uploadFile(file) {
    field.showProblem("");
    field.change("");
    uploading.textContent = `Uploading ${file.name}…`;
    try {
      field.change(await withKey(() => upload(file)));
      return true;
    } catch (error) {
      field.showProblem(error.message);
      return false;
    } finally {
      uploading.textContent = "";
    }
  }
}

function listen(field, control, picker) {
  picker.addEventListener("change", () => picker.files[0] && field.upload(picker.files[0]));
  control.addEventListener("paste", ({ clipboardData }) => clipboardData.files[0] && field.upload(clipboardData.files[0]));
  field.node.addEventListener("dragover", (event) => event.preventDefault());
  field.node.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    field.drop(event.dataTransfer);
  });
}
