// One request in the grid: its position in the queue, its steps and preview, then its images.

import * as api from "./api.js";
import { button, element } from "./elements.js";
import { figure } from "./figure.js";
import { sidesOf } from "./labels.js";
import { isFromElsewhere } from "./recent_runs.js";

// The button for variations takes the place of that for cancelling only later, so that a late click hits neither.
const PAUSE_MS = 1000;
// The status of a request that was cancelled here, by its client elsewhere or by the operator, or whose client went away.
const CANCELLED = 499;

function messageOf({ status, message }) {
  if (status === CANCELLED) return "Cancelled";
  return status === 404 ? "The server no longer stores this request." : message;
}

export class Run {
  // `actions` are the functions that the buttons call: { useSettings(run), vary(run, index), onUpdate(run),
  // onFinish(run), onDelete(run), ... }; figure.js lists those of an image.
  constructor(request, actions) {
    this.request = request;
    this.actions = actions;
    this.results = [];
    this.lines = [];
    this.position = null;
    this.state = element("p", { className: "state", textContent: "Sending…" });
    // Screen readers say how it ends, not each step.
    this.state.setAttribute("role", "status");
    this.state.setAttribute("aria-live", "off");
    this.bar = element("progress", { max: 1, ariaLabel: "Steps" });
    this.images = element("div", { className: "images" });
    this.reservePlace();
    this.cancelButton = button("Cancel", () => this.cancel());
    this.varyButton = button("3 variations", () => actions.vary(this, 0), { hidden: true, title: "Three more images, with neighbouring seeds" });
    this.raw = element("pre", { tabIndex: 0 });
    this.logs = element("pre", { tabIndex: 0 });
    this.node = this.card();
  }

  card() {
    const { request } = this;
    const prompt = element("p", { className: "prompt", textContent: request.input.prompt ?? "", title: request.input.prompt ?? "" });
    const actions = element(
      "div", { className: "actions" }, this.cancelButton, this.varyButton,
      button("Use these settings", () => this.actions.useSettings(this)),
      button("Delete", () => this.delete()),
    );
    const more = element(
      "details", {}, element("summary", { textContent: "Request, response and logs" }),
      element("pre", { tabIndex: 0, textContent: `${request.endpoint}\n${JSON.stringify(request.input, null, 2)}` }), this.raw, this.logs,
    );
    const startedAt = new Date(request.startedAt);
    const time = element("time", {
      dateTime: startedAt.toISOString(), title: startedAt.toLocaleString(),
      textContent: startedAt.toLocaleTimeString([], { hour: "numeric", minute: "2-digit" }),
    });
    const origin = element("span", { className: "origin", hidden: !isFromElsewhere(request), textContent: "Sent by another program", title: "Or by another browser, with the same key" });
    const node = element("li", { className: "run" }, this.images, prompt, this.bar, element("div", { className: "about" }, this.state, origin, time), actions, more);
    node.dataset.requestId = request.requestId;
    return node;
  }

  // Keep the place of the images free, so that nothing moves when they come.
  reservePlace() {
    const { image_size: size, num_images: number = 1 } = this.request.input;
    const [width, height] = sidesOf(size);
    if (!(width && height)) return;
    const columns = number > 1 ? 2 : 1;
    this.images.classList.add("pending");
    this.images.style.aspectRatio = (columns * width) / (Math.ceil(number / columns) * height);
  }

  freePlace() {
    this.images.classList.remove("pending");
    this.images.style.aspectRatio = "";
  }

  // Return the input that reproduces the images. A seed that the server chose is known once the request completes.
  settings() {
    return { ...this.request.input, seed: this.seed ?? this.request.input.seed };
  }

  async follow() {
    for await (const status of api.statuses(this.request)) this.update(status);
    try {
      this.finish(await api.result(this.request));
    } catch (error) {
      this.fail(error);
    }
  }

  // Return what its time left is estimated from: see estimate.js.
  progress() {
    const isStarted = this.bar.position >= 0;
    return { input: this.request.input, logs: this.lines, position: this.position, step: isStarted ? this.bar.value : 0, numSteps: isStarted ? this.bar.max : 0 };
  }

  update({ status, queue_position: position, logs, preview }) {
    this.node.dataset.status = status;
    this.wasRunning ||= status === "IN_PROGRESS";
    this.position = position ?? null;
    if (logs) {
      this.lines = logs;
      this.logs.textContent = logs.map(({ message }) => message).join("\n");
    }
    for (const { message } of logs ?? []) {
      const step = /^step (\d+)\/(\d+)$/.exec(message);
      if (step) [this.bar.value, this.bar.max] = [Number(step[1]), Number(step[2])];
    }
    if (preview) this.showPreview(preview);
    const ahead = position === 1 ? "1 request ahead" : `${position} requests ahead`;
    const labels = {
      IN_QUEUE: position ? `Waiting, ${ahead}` : "Next in queue",
      IN_PROGRESS: this.bar.position >= 0 ? `Step ${this.bar.value} of ${this.bar.max}` : "Ready to start",
      COMPLETED: "Done",
      UNREACHABLE: "Cannot reach the server, retrying…",
    };
    this.state.textContent = labels[status];
    this.actions.onUpdate(this);
  }

  showPreview(url) {
    this.images.replaceChildren(element("img", { src: url, alt: "Preview", className: "preview" }));
  }

  finish(output) {
    const seconds = output.timings?.inference;
    this.seed = output.seed;
    this.seconds = seconds;
    this.node.dataset.status = "COMPLETED";
    this.end(`Seed ${output.seed}${seconds === undefined ? "" : `, ${seconds.toFixed(seconds < 1 ? 2 : 1)} s`}`);
    this.raw.textContent = JSON.stringify(output, null, 2);
    this.results = output.images.map(({ url, width, height }, index) => ({
      run: this, index, url: api.localUrl(url), width, height, isFlagged: Boolean(output.has_nsfw_concepts?.[index]),
    }));
    this.images.replaceChildren(...this.results.map((result) => figure(result, this.actions)));
    this.images.dataset.count = this.results.length;
    this.actions.onFinish(this);
  }

  fail(error) {
    this.images.replaceChildren();
    this.end(messageOf(error));
    if (error.body) this.raw.textContent = JSON.stringify(error.body, null, 2);
    this.node.dataset.status = "FAILED";
  }

  end(state) {
    this.state.setAttribute("aria-live", "polite");
    this.state.textContent = state;
    this.bar.hidden = this.cancelButton.disabled = this.isDone = true;
    this.freePlace();
    setTimeout(() => {
      this.cancelButton.hidden = true;
      this.varyButton.hidden = !this.results.length;
    }, this.wasRunning ? PAUSE_MS : 0);
    this.actions.onUpdate(this);
    if (this.isDeleted) api.deleteRequest(this.request).catch(this.actions.onError);
  }

  // Returns whether the server agreed.
  async cancel() {
    try {
      await api.cancel(this.request);
      return true;
    } catch (error) {
      this.actions.onError(error);
      return false;
    }
  }

  // Remove the request from the page and, with its images, from the server. A running request is cancelled first.
  // Returns whether the user and the server agreed.
  async delete() {
    if (this.results.length && !(await this.actions.confirmDelete(this))) return false;
    this.isDeleted = true;
    try {
      await (this.isDone ? api.deleteRequest(this.request) : api.cancel(this.request));
    } catch (error) {
      this.isDeleted = false;
      this.actions.onError(error);
      return false;
    }
    this.actions.onDelete(this);
    return true;
  }
}
