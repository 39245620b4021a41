// A form built from an endpoint's schema: each property becomes one field.

import { element } from "./elements.js";
import { fileField } from "./file_field.js";
import { labelOf, PRESETS, sidesOf } from "./labels.js";
import { maskButton } from "./mask_button.js";

// The fields that most people change, in the order in which they are shown. The other fields are under "More settings",
// in the schema's order.
const FIRST = ["prompt", "image_url", "mask_url", "loras", "image_size", "strength", "num_images", "seed"];

// Return the input of an endpoint's OpenAPI document: { properties, order, required, schemas }.
export function schemaOf(openApi) {
  const schemas = openApi.components.schemas;
  const body = Object.values(openApi.paths).map(({ post }) => post?.requestBody).find(Boolean);
  const input = resolve(body.content["application/json"].schema, schemas);
  const properties = Object.fromEntries(Object.entries(input.properties).map(([name, property]) => [name, resolve(property, schemas)]));
  return { properties, order: input["x-fal-order-properties"], required: input.required ?? [], schemas };
}

// Build the form. Returns its fields by name, each { node, read() -> value or undefined, write(value),
// showProblem(message) }.
export function build({ properties, order, required, schemas }, containers, onChange) {
  const fields = new Map();
  for (const container of Object.values(containers)) container.replaceChildren();
  for (const name of order) {
    const field = createField(name, { ...properties[name], description: withLabels(properties[name].description, order) }, schemas, fields);
    field.node.addEventListener("input", onChange);
    fields.set(name, field);
  }
  const isFirst = (name) => FIRST.includes(name) || required.includes(name);
  const rank = (name) => (FIRST.indexOf(name) + 1 || FIRST.length + 1);
  for (const name of [...order].sort((a, b) => rank(a) - rank(b))) {
    (isFirst(name) ? containers.first : containers.more).append(fields.get(name).node);
  }
  return fields;
}

// Replace the names of fields in a description, such as image_url, by their labels. Names of one word stay: they may be
// plain words.
const withLabels = (text = "", names) =>
  text.replace(/\b[a-z]+(_[a-z\d]+)+\b/g, (word) => (names.includes(word) ? `“${labelOf(word)}”` : word));

export const read = (fields) =>
  Object.fromEntries([...fields].map(([name, field]) => [name, field.read()]).filter(([, value]) => value !== undefined));

export function write(fields, values) {
  for (const [name, field] of fields) field.write(values[name]);
}

// Put an image's URL into a field, given by its path: a name, or the names of lists and of a field of their first items.
export function writeImage(fields, path, url) {
  const [name, ...inner] = path.split(".");
  const field = fields.get(name);
  if (inner.length) field.writeImage(inner.join("."), url);
  else field.write(url);
}

// Move the focus to a field, and open "More settings" if the field is there.
export function focus(fields, path) {
  const { node } = fields.get(path.split(".")[0]);
  const details = node.closest("details");
  if (details) details.open = true;
  node.scrollIntoView({ block: "nearest" });
  node.querySelector("input, textarea, select, button")?.focus();
}

// Wait until every upload ends. Returns false if one failed.
export async function settled(fields) {
  return (await Promise.all([...fields.values()].map((field) => field.settled?.() ?? true))).every(Boolean);
}

// Show each problem at its field and focus the first. Returns the problems that belong to no field, one per line.
export function showProblems(fields, problems) {
  for (const field of fields.values()) field.showProblem("");
  const unmatched = problems.filter(([path, message]) => !fields.get(path.split(".")[0])?.showProblem(message));
  const first = document.querySelector("[aria-invalid=true]");
  const details = first?.closest("details");
  if (details) details.open = true;
  first?.focus();
  return unmatched.map(([path, message]) => `${path}: ${message}`).join("\n");
}

const resolve = (property, schemas) => {
  const reference = property.$ref ?? (property.allOf?.length === 1 && property.allOf[0].$ref);
  return reference ? { ...schemas[reference.split("/").pop()], ...property } : property;
};

// `fields` are the form's other fields: a mask is drawn over the image of the field image_url.
function createField(name, property, schemas, fields = new Map()) {
  const choices = property.enum;
  if (name === "image_size") return sizeField(name, property);
  if (property.type === "array") return listField(name, property, resolve(property.items, schemas), schemas);
  if (/(^|_)url$|^path$/.test(name)) {
    return fileField(name, property, frame, name === "mask_url" ? [maskButton(() => fields.get("image_url"))] : []);
  }
  if (choices) return choiceField(name, property, choices);
  if (property.type === "boolean") return switchField(name, property);
  if (name === "seed") return seedField(name, property);
  if (["integer", "number"].includes(property.type)) return numberField(name, property);
  return textField(name, property);
}

// The parts that all fields share: a label, the control, a description and an error message.
function frame(name, property, control, ...more) {
  control.id = `field-${property.fieldId ?? name}`;
  control.setAttribute("aria-describedby", `${control.id}-about ${control.id}-problem`);
  const label = element("label", { textContent: labelOf(name), htmlFor: control.id });
  const about = element("small", { id: `${control.id}-about`, textContent: property.description ?? "" });
  const problem = element("p", { id: `${control.id}-problem`, className: "problem" });
  const node = element("div", { className: "field" }, label, control, ...more, about, problem);
  node.dataset.name = name;
  const showProblem = (message) => {
    problem.textContent = message;
    control.setAttribute("aria-invalid", String(Boolean(message)));
    return true;
  };
  return { node, showProblem };
}

function textField(name, property) {
  const control = element("textarea", { rows: 3, placeholder: property.example?.slice(0, 120) ?? "" });
  const write = (value) => (control.value = value ?? property.default ?? "");
  write();
  return { ...frame(name, property, control), read: () => control.value, write };
}

function numberField(name, property) {
  const { minimum = "", maximum = "", type } = property;
  const step = type === "integer" ? 1 : "any";
  const control = element("input", { type: "number", min: minimum, max: maximum, step });
  const slider = element("input", { type: "range", min: minimum, max: maximum, step: type === "integer" ? 1 : 0.01 });
  slider.setAttribute("aria-label", `${labelOf(name)}, slider`);
  const write = (value) => (control.value = slider.value = value ?? property.default ?? "");
  control.addEventListener("input", () => (slider.value = control.value));
  slider.addEventListener("input", () => (control.value = slider.value));
  write();
  const extra = minimum !== "" && maximum !== "" ? [slider] : [];
  return { ...frame(name, property, control, ...extra), read: () => number(control.value), write };
}

const number = (text) => (text === "" ? undefined : Number(text));

function seedField(name, property) {
  const control = element("input", { type: "number", min: property.minimum, max: property.maximum, step: 1 });
  control.placeholder = "Random";
  const newSeed = element("button", { type: "button", textContent: "New seed", title: "Set a new random seed" });
  const lock = element("button", { type: "button", textContent: "Lock", title: "Reuse the seed of the last image" });
  const random = () => Math.floor(Math.random() * 2 ** 32);
  let lastSeed;
  const updateLock = () => lock.setAttribute("aria-pressed", String(control.value !== ""));
  const change = (value) => {
    control.value = value;
    control.dispatchEvent(new Event("input", { bubbles: true }));
  };
  newSeed.addEventListener("click", () => change(random()));
  lock.addEventListener("click", () => change(control.value === "" ? (lastSeed ?? random()) : ""));
  control.addEventListener("input", updateLock);
  const row = element("span", { className: "row" }, newSeed, lock);
  const write = (value) => {
    control.value = value ?? "";
    updateLock();
  };
  write();
  const setLastSeed = (seed) => (lastSeed = seed);
  return { ...frame(name, property, control, row), read: () => number(control.value), write, setLastSeed };
}

function choiceField(name, property, choices) {
  const control = element("select", {}, ...choices.map((choice) => element("option", { textContent: choice })));
  const write = (value) => (control.value = value ?? property.default ?? choices[0]);
  write();
  return { ...frame(name, property, control), read: () => control.value, write };
}

function switchField(name, property) {
  const control = element("input", { type: "checkbox" });
  const write = (value) => (control.checked = value ?? property.default ?? false);
  write();
  return { ...frame(name, property, control), read: () => control.checked, write };
}

// fal's presets, each a button that shows its shape. Two number inputs set a custom size.
function sizeField(name, property) {
  let size = property.default;
  const group = element("div", { className: "sizes" });
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", labelOf(name));
  // Without a default, the image has the size of the input image.
  const placeholder = property.default === undefined ? "Auto" : "";
  const width = element("input", { type: "number", min: 64, step: 1, ariaLabel: "Width in pixels", placeholder });
  const height = element("input", { type: "number", min: 64, step: 1, ariaLabel: "Height in pixels", placeholder });
  const buttons = Object.entries(PRESETS).map(([preset, [w, h]]) => {
    const shape = element("span", { className: "shape" });
    shape.style.aspectRatio = `${w} / ${h}`;
    shape.style[w < h ? "height" : "width"] = "26px";
    const button = element("button", { type: "button", title: `${preset}, ${w}×${h}` }, shape, element("small", { textContent: `${w}×${h}` }));
    button.dataset.preset = preset;
    button.addEventListener("click", () => choose(preset, true));
    return button;
  });
  const choose = (value, isUserInput = false) => {
    size = PRESETS[value] || value?.width ? value : property.default;
    const [w = "", h = ""] = sidesOf(size);
    [width.value, height.value] = [w, h];
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.preset === size));
    if (isUserInput) group.dispatchEvent(new Event("input", { bubbles: true }));
  };
  for (const side of [width, height]) {
    side.addEventListener("input", () => {
      size = width.value || height.value ? { width: Number(width.value), height: Number(height.value) } : property.default;
      for (const button of buttons) button.setAttribute("aria-pressed", "false");
    });
  }
  group.append(...buttons, element("span", { className: "row" }, width, "×", height));
  choose(property.default);
  return { ...frame(name, property, group), read: () => size, write: choose };
}

// A list of objects, such as LoRAs. Each item is a small form, whose fields have numbered ids.
let numItems = 0;
function listField(name, property, item, schemas) {
  const list = element("div", { className: "list" });
  list.setAttribute("role", "group");
  list.setAttribute("aria-label", labelOf(name));
  const rows = [];
  const add = (values = {}) => {
    const fields = new Map();
    const place = (numItems += 1);
    for (const [key, value] of Object.entries(item.properties ?? {})) {
      fields.set(key, createField(key, { ...resolve(value, schemas), fieldId: `${name}-${place}-${key}` }, schemas));
      fields.get(key).write(values[key]);
    }
    const remove = element("button", { type: "button", textContent: "Remove" });
    const node = element("fieldset", {}, ...[...fields.values()].map((field) => field.node), remove);
    const row = { node, fields };
    remove.addEventListener("click", () => {
      rows.splice(rows.indexOf(row), 1);
      node.remove();
      list.dispatchEvent(new Event("input", { bubbles: true }));
    });
    rows.push(row);
    addButton.before(node);
  };
  const addButton = element("button", { type: "button", textContent: "Add" });
  addButton.addEventListener("click", () => add());
  list.append(addButton);
  // A link may hold anything.
  const write = (values) => {
    for (const row of rows.splice(0)) row.node.remove();
    for (const value of Array.isArray(values) ? values : []) add(value ?? {});
  };
  const settledRows = async () => (await Promise.all(rows.map((row) => settled(row.fields)))).every(Boolean);
  const writeFirst = (path, url) => {
    if (!rows.length) add();
    writeImage(rows[0].fields, path, url);
  };
  const values = () => (rows.length ? rows.map((row) => read(row.fields)) : undefined);
  return { ...frame(name, property, list), settled: settledRows, write, writeImage: writeFirst, read: values };
}
