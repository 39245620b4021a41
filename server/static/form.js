// A form made from an endpoint's own schema: each property becomes one field, in the schema's order.

import { here, upload } from "./api.js";
import { withKey } from "./api_key.js";

// What most people change; the rest is folded away.
const FIRST = ["prompt", "image_url", "loras", "image_size", "strength", "num_images", "seed"];

export const element = (tag, attributes = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
};

// The form's fields by name, each { node, read() -> value or undefined, write(value), complain(words) }.
export function build(document_, places, changed) {
  const schemas = document_.components.schemas;
  const schema = Object.values(schemas).find((each) => each.title?.endsWith("Input") && each["x-fal-order-properties"]);
  const fields = new Map();
  for (const place of Object.values(places)) place.replaceChildren();
  for (const name of schema["x-fal-order-properties"]) {
    const field = made(name, resolved(schema.properties[name], schemas), schemas);
    field.isRequired = schema.required?.includes(name) ?? false;
    field.node.addEventListener("input", changed);
    fields.set(name, field);
    (FIRST.includes(name) || field.isRequired ? places.first : places.more).append(field.node);
  }
  return fields;
}

export const read = (fields) =>
  Object.fromEntries([...fields].map(([name, field]) => [name, field.read()]).filter(([, value]) => value !== undefined));

export function write(fields, values) {
  for (const [name, field] of fields) field.write(values[name]);
}

export function complain(fields, problems) {
  for (const field of fields.values()) field.complain("");
  const strays = problems.filter(([place, words]) => !fields.get(place.split(".")[0])?.complain(words));
  const first = document.querySelector("[aria-invalid=true]");
  const folded = first?.closest("details");
  if (folded) folded.open = true;
  first?.focus();
  return strays.map(([place, words]) => `${place}: ${words}`).join("\n");
}

const resolved = (property, schemas) => {
  const reference = property.$ref ?? (property.allOf?.length === 1 && property.allOf[0].$ref);
  return reference ? { ...schemas[reference.split("/").pop()], ...property } : property;
};

function made(name, property, schemas) {
  const choices = property.enum;
  if (name === "image_size") return sizeField(name, property);
  if (property.type === "array") return listField(name, property, resolved(property.items, schemas));
  if (/(^|_)url$|^path$/.test(name)) return fileField(name, property);
  if (choices) return choiceField(name, property, choices);
  if (property.type === "boolean") return switchField(name, property);
  if (name === "seed") return seedField(name, property);
  if (["integer", "number"].includes(property.type)) return numberField(name, property);
  return textField(name, property);
}

const words = (name) => name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

// The frame that every field has: a label, its description, its control, and room for what is wrong with it.
function frame(name, property, control, ...more) {
  control.id = `field-${name}`;
  control.setAttribute("aria-describedby", `${control.id}-about ${control.id}-problem`);
  const label = element("label", { textContent: words(name), htmlFor: control.id });
  const about = element("small", { id: `${control.id}-about`, textContent: property.description ?? "" });
  const problem = element("p", { id: `${control.id}-problem`, className: "problem" });
  const node = element("div", { className: `field ${name}` }, label, control, ...more, about, problem);
  const complain = (words) => {
    problem.textContent = words;
    control.setAttribute("aria-invalid", String(Boolean(words)));
    return true;
  };
  return { node, complain };
}

function textField(name, property) {
  const control = element("textarea", { rows: 3, placeholder: property.examples?.[0]?.slice(0, 120) ?? "" });
  const write = (value) => (control.value = value ?? property.default ?? "");
  write();
  return { ...frame(name, property, control), read: () => control.value, write };
}

function numberField(name, property) {
  const { minimum = "", maximum = "", type } = property;
  const step = type === "integer" ? 1 : "any";
  const control = element("input", { type: "number", min: minimum, max: maximum, step });
  const slider = element("input", { type: "range", min: minimum, max: maximum, step: type === "integer" ? 1 : 0.01 });
  slider.setAttribute("aria-label", `${words(name)}, slider`);
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
  control.placeholder = "random each time";
  const dice = element("button", { type: "button", textContent: "Roll", title: "Choose a seed and keep it" });
  const lock = element("button", { type: "button", textContent: "Lock", title: "Keep the last picture's seed" });
  const random = () => Math.floor(Math.random() * 2 ** 32);
  let last;
  const shown = () => lock.setAttribute("aria-pressed", String(control.value !== ""));
  const changed = (value) => {
    control.value = value;
    control.dispatchEvent(new Event("input", { bubbles: true }));
  };
  dice.addEventListener("click", () => changed(random()));
  lock.addEventListener("click", () => changed(control.value === "" ? (last ?? random()) : ""));
  control.addEventListener("input", shown);
  const row = element("span", { className: "row" }, dice, lock);
  const write = (value) => {
    control.value = value ?? "";
    shown();
  };
  write();
  const told = (seed) => (last = seed);
  return { ...frame(name, property, control, row), read: () => number(control.value), write, told };
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

// fal's presets as buttons of their own shape, and two numbers for a size of one's own.
const PRESETS = {
  square_hd: [1024, 1024], square: [512, 512], portrait_4_3: [768, 1024],
  portrait_16_9: [576, 1024], landscape_4_3: [1024, 768], landscape_16_9: [1024, 576],
};

function sizeField(name, property) {
  let chosen = property.default;
  const group = element("div", { className: "sizes" });
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", words(name));
  const width = element("input", { type: "number", min: 64, step: 1, ariaLabel: "Width in pixels" });
  const height = element("input", { type: "number", min: 64, step: 1, ariaLabel: "Height in pixels" });
  const buttons = Object.entries(PRESETS).map(([preset, [w, h]]) => {
    const shape = element("span", { className: "shape" });
    shape.style.aspectRatio = `${w} / ${h}`;
    shape.style[w < h ? "height" : "width"] = "26px";
    const button = element("button", { type: "button", title: `${preset}, ${w}×${h}` }, shape, element("small", { textContent: `${w}×${h}` }));
    button.dataset.preset = preset;
    button.addEventListener("click", () => choose(preset, true));
    return button;
  });
  const choose = (value, tells = false) => {
    chosen = value ?? property.default;
    const [w, h] = PRESETS[chosen] ?? [chosen?.width ?? "", chosen?.height ?? ""];
    [width.value, height.value] = [w, h];
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.preset === chosen));
    if (tells) group.dispatchEvent(new Event("input", { bubbles: true }));
  };
  for (const side of [width, height]) {
    side.addEventListener("input", () => {
      chosen = { width: Number(width.value), height: Number(height.value) };
      for (const button of buttons) button.setAttribute("aria-pressed", "false");
    });
  }
  group.append(...buttons, element("span", { className: "row" }, width, "×", height));
  choose(property.default);
  return { ...frame(name, property, group), read: () => chosen, write: choose };
}

// An address, typed or pasted, or a file that is dropped, pasted or chosen, and uploaded to this server.
function fileField(name, property) {
  const control = element("input", { type: "text", placeholder: "https://…, or drop a file here" });
  const chooser = element("input", { type: "file", hidden: true });
  const choose = element("button", { type: "button", textContent: "Choose a file" });
  const shown = element("img", { alt: "", hidden: true });
  const show = () => {
    shown.hidden = !/^data:image\/|\/files\//.test(control.value);
    if (!shown.hidden) shown.src = here(control.value);
  };
  const field = frame(name, property, control, element("span", { className: "row" }, choose, chooser, shown));
  const take = async (file) => {
    if (!file) return;
    field.complain("");
    control.value = "uploading…";
    try {
      control.value = await withKey(() => upload(file));
    } catch (error) {
      control.value = "";
      field.complain(error.message);
    }
    control.dispatchEvent(new Event("input", { bubbles: true }));
    show();
  };
  choose.addEventListener("click", () => chooser.click());
  chooser.addEventListener("change", () => take(chooser.files[0]));
  control.addEventListener("input", show);
  control.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  field.node.addEventListener("dragover", (event) => event.preventDefault());
  field.node.addEventListener("drop", (event) => {
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  const write = (value) => {
    control.value = value ?? "";
    show();
  };
  return { ...field, read: () => control.value || undefined, write };
}

// Several of one kind, such as LoRAs: each a small form of its own.
function listField(name, property, item) {
  const list = element("div", { className: "list" });
  list.setAttribute("role", "group");
  list.setAttribute("aria-label", words(name));
  const rows = [];
  const add = (values = {}) => {
    const fields = new Map(Object.entries(item.properties ?? {}).map(([key, value]) => [key, made(key, value, {})]));
    for (const [key, field] of fields) {
      field.node.querySelector("[id]").id = `field-${name}-${rows.length}-${key}`;
      field.node.querySelector("label").htmlFor = `field-${name}-${rows.length}-${key}`;
      field.write(values[key]);
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
    more.before(node);
  };
  const more = element("button", { type: "button", textContent: "Add" });
  more.addEventListener("click", () => add());
  list.append(more);
  const write = (values = []) => {
    for (const row of rows.splice(0)) row.node.remove();
    for (const each of values) add(each);
  };
  return { ...frame(name, property, list), read: () => (rows.length ? rows.map((row) => read(row.fields)) : undefined), write };
}
