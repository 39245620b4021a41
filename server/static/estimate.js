// How long requests take, from the measured times of their steps.

import * as api from "./api.js";
import { sizeText } from "./labels.js";

let measured = [];

// Load the mean times of a step since the server's start, by size and acceleration.
export async function loadStepTimes() {
  measured = (await api.stepTimes()).steps;
}

// The mean seconds of a step with the request's size and acceleration, or else its size, or else of all steps; null if
// the server has not run a step yet.
function secondsOfStep(input) {
  const isSameSize = ({ size }) => size === sizeText(input.image_size);
  const isSameTier = ({ acceleration }) => acceleration === (input.acceleration ?? "none");
  const choices = [measured.filter((each) => isSameSize(each) && isSameTier(each)), measured.filter(isSameSize), measured];
  const steps = choices.find((each) => each.length) ?? [];
  const count = steps.reduce((sum, each) => sum + each.count, 0);
  return count ? steps.reduce((sum, each) => sum + each.count * each.seconds, 0) / count : null;
}

// The seconds between the first and the last step in the log, for each step; null with fewer than two steps.
function ownSecondsOfStep(logs) {
  const steps = logs.filter(({ message }) => message.startsWith("step "));
  if (steps.length < 2) return null;
  return (Date.parse(steps.at(-1).timestamp) - Date.parse(steps[0].timestamp)) / 1000 / (steps.length - 1);
}

const stepsLeft = ({ input, step, numSteps }) => (numSteps || (input.num_inference_steps ?? 28)) - step;

// Seconds of work that a request still needs; null if unknown. `run` is { input, step, numSteps, logs }.
function workOf(run) {
  const perStep = ownSecondsOfStep(run.logs) ?? secondsOfStep(run.input);
  return perStep === null ? null : stepsLeft(run) * perStep;
}

// The work left by which the server orders the requests that run: how fast one of them was so far does not count.
const rank = (run) => stepsLeft(run) * (secondsOfStep(run.input) ?? 1);

// Seconds until each of these unfinished requests is done, as [[run, seconds or null], ...] in the order in which they
// end. Each run has its `position` in the queue, or null while it runs. Of those that run, the one with the least work
// left comes first, as on the server. Requests of others count as the mean of these. With several GPUs it takes less.
export function secondsLeft(runs) {
  const ordered = [...runs].sort((a, b) => (a.position ?? -1) - (b.position ?? -1) || (a.position === null && rank(a) - rank(b)) || 0);
  const works = ordered.map(workOf);
  const known = works.filter((work) => work !== null);
  const mean = known.length ? known.reduce((sum, work) => sum + work, 0) / known.length : 0;
  const numRunning = ordered.filter(({ position }) => position === null).length;
  let total = 0;
  return ordered.map((run, place) => {
    total += works[place] ?? mean;
    const others = run.position === null ? 0 : Math.max(0, run.position - (place - numRunning));
    return [run, known.length ? total + others * mean : null];
  });
}

export function inWords(seconds) {
  if (seconds < 1.5) return "about 1 second";
  if (seconds < 90) return `about ${Math.round(seconds)} seconds`;
  if (seconds < 5400) return `about ${Math.round(seconds / 60)} minutes`;
  return `about ${Math.round(seconds / 3600)} hours`;
}
