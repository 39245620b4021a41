// A mask as a list of operations on a canvas, so that each can be undone: strokes, inversion, clearing.

// What is masked is drawn in this colour, over the image.
const COLOUR = "#e5309a";

// `canvas` has the size of the image.
export class MaskDrawing {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.operations = [];
  }

  // Start a line of this width, in pixels of the image. An eraser removes what it passes.
  start(point, width, isEraser) {
    this.operations.push({ kind: "stroke", width, isEraser, points: [point] });
    this.draw(this.operations.at(-1));
  }

  // Continue the line to this point.
  extend(point) {
    const { points, ...stroke } = this.operations.at(-1);
    points.push(point);
    this.draw({ ...stroke, points: points.slice(-2) });
  }

  add(kind, values = {}) {
    this.operations.push({ kind, ...values });
    this.draw(this.operations.at(-1));
  }

  // Take back the last operation. Returns whether there was one.
  undo() {
    const undone = this.operations.pop();
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (const operation of this.operations) this.draw(operation);
    return Boolean(undone);
  }

  draw(operation) {
    const { context, canvas: { width, height } } = this;
    context.save();
    if (operation.kind === "stroke") drawStroke(context, operation);
    if (operation.kind === "clear") context.clearRect(0, 0, width, height);
    if (operation.kind === "image") drawMask(context, operation.image, width, height);
    if (operation.kind === "invert") {
      context.globalCompositeOperation = "source-out";
      context.fillStyle = COLOUR;
      context.fillRect(0, 0, width, height);
    }
    context.restore();
  }

  get isEmpty() {
    const { data } = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    return !data.some((value, index) => index % 4 === 3 && value > 0);
  }

  // Return the mask as the server expects it, on a new canvas: white where it is drawn, otherwise black.
  toBlackAndWhite() {
    const { width, height } = this.canvas;
    const result = Object.assign(document.createElement("canvas"), { width, height });
    const context = result.getContext("2d");
    context.drawImage(this.canvas, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    return result;
  }
}

function drawStroke(context, { points: [first, ...others], width, isEraser }) {
  context.globalCompositeOperation = isEraser ? "destination-out" : "source-over";
  Object.assign(context, { strokeStyle: COLOUR, lineWidth: width, lineCap: "round", lineJoin: "round" });
  context.beginPath();
  context.moveTo(first.x, first.y);
  // A line of no length draws a dot.
  for (const { x, y } of others.length ? others : [first]) context.lineTo(x, y);
  context.stroke();
}

// Draw an earlier mask: its brightness becomes opacity.
function drawMask(context, image, width, height) {
  const copy = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
  copy.drawImage(image, 0, 0, width, height);
  const pixels = copy.getImageData(0, 0, width, height);
  for (let place = 0; place < pixels.data.length; place += 4) pixels.data[place + 3] = pixels.data[place];
  copy.putImageData(pixels, 0, 0);
  copy.globalCompositeOperation = "source-in";
  copy.fillStyle = COLOUR;
  copy.fillRect(0, 0, width, height);
  context.drawImage(copy.canvas, 0, 0);
}
