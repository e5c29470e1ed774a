/**
 * The guided policy of a step, from what a response with `detail: "candidates"` says of it: numbers in, numbers out.
 *
 * It mirrors `qsharp_core/policy.py`, `returns.py` and `budget.py` in float64. Scores do not depend on eta, so eta,
 * method and tail can change without asking the server again. Log-probabilities and KL are in nats, values in units of
 * reward. A slider asks for some 10,000 candidates at each of its moves: hence loops, and what does not depend on eta
 * is kept.
 */

export function logSumExp(values) {
  let most = -Infinity;
  for (const value of values) if (value > most) most = value;
  if (most === -Infinity) return most;
  let total = 0;
  for (const value of values) total += Math.exp(value - most);
  return most + Math.log(total);
}

const logAddExp = (a, b) => {
  const most = Math.max(a, b);
  return most === -Infinity ? most : most + Math.log1p(Math.exp(Math.min(a, b) - most));
};

const logSigmoid = (x) => (x >= 0 ? -Math.log1p(Math.exp(-x)) : x - Math.log1p(Math.exp(x)));

/** `ln P(z = atom)` of each atom, from a candidate's outputs. */
function logProbabilities(distribution, outputs) {
  if (distribution.kind === "bernoulli") return [logSigmoid(-outputs[0]), logSigmoid(outputs[0])];
  const norm = logSumExp(outputs);
  return outputs.map((output) => output - norm);
}

/** The reward that the critic expects of a candidate, from its outputs. */
export function expectedReward(distribution, outputs) {
  let expected = 0;
  logProbabilities(distribution, outputs).forEach((logP, i) => (expected += Math.exp(logP) * distribution.atoms[i]));
  return expected;
}

const DUST = 1e-7; // nats: with less than this left, a step is the reference's
const LEAST = 2 ** -31; // strengths below this are not told apart from 0 by their power of two
const HALVINGS = 30; // of a bracket between two powers of two

const kept = new WeakMap();

/** What of a step does not depend on eta: log-probabilities of atoms, expectations, and the masses under ref. */
function factsOf(candidates, distribution) {
  let facts = kept.get(candidates);
  if (facts?.distribution !== distribution) {
    const logMass = logSumExp(candidates.ref_logprobs);
    facts = {
      distribution,
      logProbs: candidates.outputs.map((outputs) => logProbabilities(distribution, outputs)),
      expected: candidates.outputs.map((outputs) => expectedReward(distribution, outputs)),
      logMass,
      tailLogMass: Math.log1p(-Math.min(Math.exp(logMass), 1)),
    };
    kept.set(candidates, facts);
  }
  return facts;
}

/** `A - r_max / eta` of each candidate. */
function relativeTilts(candidates, distribution, { eta, method }) {
  const { logProbs, expected } = factsOf(candidates, distribution);
  const best = distribution.reward_range[1];
  const tilts = new Float64Array(logProbs.length);
  if (method === "cd") {
    for (let i = 0; i < tilts.length; i++) tilts[i] = (expected[i] - best) / eta;
    return tilts;
  }
  const below = distribution.atoms.map((atom) => (atom - best) / eta);
  for (let i = 0; i < tilts.length; i++) {
    const ofAtoms = logProbs[i];
    if (ofAtoms.length === 2) tilts[i] = logAddExp(ofAtoms[0] + below[0], ofAtoms[1] + below[1]);
    else tilts[i] = logSumExp(ofAtoms.map((logP, atom) => logP + below[atom]));
  }
  return tilts;
}

/**
 * The guided policy of one step.
 *
 * @param candidates a token's `candidates`: `ref_logprobs` and `outputs`.
 * @param distribution the choice's `distribution`.
 * @param settings `eta`, `method` and `tail`.
 * @param budget most nats that the step may spend.
 * @returns `logRatios` (ln pi/ref of each candidate), `tailLogRatio`, `tailLogMass` (under ref), `kl`, `value` and
 *   `strength`, the share of the tilt that was within the budget.
 */
export function guide(candidates, distribution, settings, budget = Infinity) {
  const { eta, tail } = settings;
  const logRefs = candidates.ref_logprobs;
  const [low, high] = distribution.reward_range;
  const { logMass, tailLogMass } = factsOf(candidates, distribution);
  const logRatios = relativeTilts(candidates, distribution, settings);
  const count = logRatios.length;
  let most = -Infinity;
  for (let i = 0; i < count; i++) most = Math.max(most, logRefs[i] + logRatios[i]);
  const weights = new Float64Array(count); // ref · exp(A), up to a factor
  let total = 0;
  for (let i = 0; i < count; i++) total += weights[i] = Math.exp(logRefs[i] + logRatios[i] - most);
  const tilted = most + Math.log(total);
  const tailTilt = { floor: (low - high) / eta, keep: tilted - logMass, drop: -Infinity }[tail];
  const logNorm = logAddExp(tilted, tailLogMass + tailTilt);
  const scale = Math.exp(most - logNorm);
  const tailLogRatio = tailTilt - logNorm;
  let kl = weighted(Math.exp(tailLogMass + tailLogRatio), tailLogRatio);
  for (let i = 0; i < count; i++) {
    logRatios[i] -= logNorm;
    kl += weights[i] * scale * logRatios[i];
  }
  kl = Math.max(kl, 0);
  const whole = { logRatios, tailLogRatio, tailLogMass, kl, value: high + eta * logNorm, strength: 1 };
  return kl > budget ? within(budget, logRefs, whole) : whole;
}

const weighted = (probability, logRatio) => (probability > 0 ? probability * logRatio : 0);

function divergence(logRefs, logRatios, tailLogMass, tailLogRatio) {
  let kl = weighted(Math.exp(tailLogMass + tailLogRatio), tailLogRatio);
  for (let i = 0; i < logRatios.length; i++) kl += Math.exp(logRefs[i] + logRatios[i]) * logRatios[i];
  return Math.max(kl, 0);
}

/** The policy `ref · (pi / ref)^a` of the largest `a` whose KL is within the budget. */
function within(budget, logRefs, whole) {
  const at = (a) => {
    if (a === 0) return { ...whole, logRatios: new Float64Array(logRefs.length), tailLogRatio: 0, kl: 0, strength: 0 };
    const scaled = whole.logRatios.map((ratio) => a * ratio);
    const norm = logAddExp(
      logSumExp(scaled.map((ratio, i) => logRefs[i] + ratio)),
      whole.tailLogMass + a * whole.tailLogRatio,
    );
    const logRatios = scaled.map((ratio) => ratio - norm);
    const tailLogRatio = a * whole.tailLogRatio - norm;
    const kl = divergence(logRefs, logRatios, whole.tailLogMass, tailLogRatio);
    return { ...whole, logRatios, tailLogRatio, kl, strength: a };
  };
  if (!(budget > DUST)) return at(0);
  // The engine's own bracket, so that what is left for later tokens is the same to the last digits.
  let high = 1;
  while (high > LEAST && at(high / 2).kl > budget) high /= 2;
  let low = high > LEAST ? high / 2 : 0;
  for (let i = 0; i < HALVINGS; i++) {
    const middle = (low + high) / 2;
    if (at(middle).kl <= budget) low = middle;
    else high = middle;
  }
  const made = at(low);
  return { ...made, kl: Math.min(made.kl, budget) };
}

/** `ln pi(y|x)` of a token, whose `ln ref(y|x)` is `refLogprob`. */
export function tokenLogprob(guided, candidates, tokenId, refLogprob) {
  const place = candidates.token_ids.indexOf(tokenId);
  return refLogprob + (place < 0 ? guided.tailLogRatio : guided.logRatios[place]);
}

/**
 * All steps of an answer under other settings than it was sampled with.
 *
 * @param tokens the entries of `guidance.tokens`; those without `candidates` were not guided.
 * @param budgets most nats of all tokens, `total`, and of each, `token`; null where there is no such budget.
 * @returns for each token `kl`, `value` (null where the critic was not asked), `logprob`, `strength` and `guided`.
 */
export function reweigh(tokens, distribution, settings, budgets = null) {
  const ofToken = budgets?.token ?? Infinity;
  let left = budgets?.total ?? Infinity;
  return tokens.map((token) => {
    if (!token.candidates || !distribution) {
      return { kl: 0, value: null, logprob: token.ref_logprob, strength: 1, guided: null };
    }
    const guided = guide(token.candidates, distribution, settings, Math.min(ofToken, left));
    left = Math.max(left - guided.kl, 0);
    const logprob = tokenLogprob(guided, token.candidates, token.token_id, token.ref_logprob);
    return { kl: guided.kl, value: guided.value, logprob, strength: guided.strength, guided };
  });
}
