// Requests like an earlier one: with neighbouring seeds, or with neighbouring strengths and the same seed.

const COUNT = 3;
const MAX_SEED = 2 ** 53 - 4;
const STRENGTH_STEPS = [-0.2, -0.1, 0.1, 0.2];

// The seed of the image with this index: the server adds the index to the seed of the request.
export const seedOf = (seed, index) => (seed === undefined ? undefined : seed + index);

export function withNeighbouringSeeds(input, seed) {
  return Array.from({ length: COUNT }, (_, number) => {
    const next = seed + number + 1;
    return { ...input, ...single(input), seed: next > MAX_SEED ? next - MAX_SEED : next };
  });
}

// The three nearest strengths that the endpoint's schema allows.
export function withNeighbouringStrengths(input, seed, { minimum, maximum, default: usual }) {
  const strength = input.strength ?? usual;
  const allowed = STRENGTH_STEPS.map((step) => Math.round(100 * (strength + step)) / 100)
    .filter((value) => value >= (minimum ?? 0) && value <= (maximum ?? 1));
  const nearest = allowed.sort((a, b) => Math.abs(a - strength) - Math.abs(b - strength)).slice(0, COUNT);
  return nearest.sort((a, b) => a - b).map((value) => ({ ...input, ...single(input), seed, strength: value }));
}

// A variation is one image, whatever number the original request asked for.
const single = (input) => ("num_images" in input ? { num_images: 1 } : {});
